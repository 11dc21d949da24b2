"""What every process of a job looks at before step 1: its GPU, its node, and the way to the others.

    srun python -m pipeline.operations.node_check STAGE --report DIR      every process of a job
    python -m pipeline.operations.node_check STAGE                        this machine alone

A process writes what it found into `rank_00000.json` of a shared folder, waits there for the others, and meets them over the
network only if all are well; so a node that never came is known too. `pipeline.operations.preflight` reads them all and decides.
"""

import argparse
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from data_prep.store.store import StoreError, open_store
from model.common.errors import UserError, command
from pipeline.operations.preflight import NodeReport, decide, read_reports, print_verdict
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import StageConfig, cache_root, load_stage
from pipeline.stage.corpus import open_datasets, shares

PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "safetensors")
MEETING_SECONDS = 40
MEGABYTES = 64
FREE_SHARE = 0.9
"""Of a GPU's memory, what must be free before training."""


def check_process(stage: StageConfig, ranks: Distributed, folder: Path) -> NodeReport:
    """Check this process's GPU, its node once per node, and the network; writes and returns the report."""
    begun = time.monotonic()
    report = NodeReport(os.environ.get("SLURMD_NODENAME", socket.gethostname()), ranks.rank, ranks.local_rank)
    report.gpus = torch.cuda.device_count()
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    checks: list[tuple[str, Callable[[], None]]] = [("gpu", lambda: _check_gpu(ranks, per_node))]
    if ranks.local_rank == 0:
        report.versions = versions()
        checks += [
            ("shm", _check_shared_memory),
            ("run", lambda: _check_writable(stage.run)),
            ("cache", lambda: _check_cache(stage)),
            ("store", lambda: _check_store(stage)),
        ]
    for topic, check in checks:
        try:
            check()
        except (UserError, StoreError, OSError, RuntimeError, ValueError) as error:
            report.errors.append((topic, str(error).splitlines()[0] if str(error) else type(error).__name__))
    report.write(folder)
    if _all_well(ranks, folder):
        try:
            _check_network(report, ranks, per_node)
        except (RuntimeError, ValueError) as error:  # torch's DistError and DistBackendError are RuntimeErrors
            report.errors.append(("network", str(error).splitlines()[0]))
    report.seconds = time.monotonic() - begun
    report.write(folder)
    return report


def _all_well(ranks: Distributed, folder: Path) -> bool:
    """Whether the reports of all processes are there within `MEETING_SECONDS`, and none holds an error."""
    end = time.monotonic() + MEETING_SECONDS
    while len(list(folder.glob("rank_*.json"))) < ranks.world and time.monotonic() < end:
        time.sleep(0.1)
    reports = read_reports(folder)
    return len(reports) == ranks.world and not any(report.errors for report in reports)


def versions() -> dict[str, str]:
    """What must be equal on all nodes."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, nccl.version()))
        found["gpu"] = torch.cuda.get_device_name()
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0].split("Module")[-1].split()[0] if driver.exists() else "unknown"
    return found


def _check_gpu(ranks: Distributed, per_node: int) -> None:
    """The GPU is there, free, and multiplies right; without any GPU on the node there is nothing to check."""
    count = torch.cuda.device_count()
    wanted = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if count < wanted:
        raise UserError(f"the job was given {wanted} GPUs, torch sees {count}: see nvidia-smi on the node")
    if not count:
        return
    if per_node > count:
        raise UserError(f"{per_node} processes for {count} GPUs: one process per GPU")
    device = torch.device("cuda", ranks.local_rank)
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE_SHARE * total:
        raise UserError(
            f"GPU {ranks.local_rank}: {(total - free) / 2**30:.0f} of {total / 2**30:.0f} GB are taken by another process"
        )
    # small whole numbers: every product and sum is exact in bf16's fp32 accumulation
    matrix = torch.arange(2048 * 2048, device=device, dtype=torch.int64).remainder_(3).sub_(1).reshape(2048, 2048).bfloat16()
    row_sums = (matrix @ matrix).float().sum(1)
    expected = matrix.double() @ matrix.double().sum(1)
    if not torch.equal(row_sums.double(), expected):
        raise UserError(f"GPU {ranks.local_rank}: a matrix product is wrong")


def _check_shared_memory() -> None:
    wanted = float(os.environ.get("PREFLIGHT_SHM_GB", "1"))
    size = shutil.disk_usage("/dev/shm").total / 2**30
    if size < wanted:
        raise UserError(f"/dev/shm has {size:.2f} GB, {wanted:g} are wanted: enlarge it, or set PREFLIGHT_SHM_GB")


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".preflight-{secrets.token_hex(8)}"
    probe.write_bytes(b"preflight")
    probe.unlink()


def _check_cache(stage: StageConfig) -> None:
    if not any(share.store.startswith("s3://") for share in shares(stage).values()):
        return
    folder = cache_root(stage.data)
    _check_writable(folder)
    wanted = float(os.environ.get("PREFLIGHT_CACHE_GB", "5"))
    free = shutil.disk_usage(folder).free / 2**30
    if free < wanted:
        raise UserError(
            f"{folder} has {free:.1f} GB free, {wanted:g} are wanted: empty it, set data.cache, or PREFLIGHT_CACHE_GB"
        )


def _check_store(stage: StageConfig) -> None:
    for dataset in open_datasets(stage):
        if not next(iter(dataset.folders("snapshots/")), None):
            raise UserError(f"{dataset.uri} holds no snapshot: run `python -m data_prep snapshot DATASET.yaml`")
    if stage.checkpoint.upload:
        store, key = open_store(stage.checkpoint.upload), f"preflight/{secrets.token_hex(8)}"
        store.put(key, b"preflight")
        store.delete(key)


def _check_network(report: NodeReport, ranks: Distributed, per_node: int) -> None:
    """Meet all processes, compare clocks, and time all-reduces."""
    device = torch.device("cuda", ranks.local_rank) if report.gpus else torch.device("cpu")
    if report.gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if report.gpus else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=MEETING_SECONDS))
    dist.all_reduce(torch.ones(1, device=device))
    if report.gpus:
        torch.cuda.synchronize()
    report.clock = time.time()
    groups = [list(range(first, first + per_node)) for first in range(0, ranks.world, per_node)]
    if 1 < per_node < ranks.world:
        own = [dist.new_group(group) for group in groups][ranks.rank // per_node]
        report.node_bandwidth = _bandwidth(own, per_node, device)
    report.bandwidth = _bandwidth(None, ranks.world, device)
    dist.barrier()
    dist.destroy_process_group()


def _bandwidth(group: Any, world: int, device: torch.device) -> float:
    """GB/s over each process's link in a ring all-reduce, the mean of three after one to warm up."""
    megabytes = MEGABYTES if device.type == "cuda" else MEGABYTES // 8
    data = torch.zeros(megabytes * 2**18, device=device)
    dist.all_reduce(data, group=group)
    begun = time.monotonic()
    for _ in range(3):
        dist.all_reduce(data, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.monotonic() - begun) / 3
    return 2 * (world - 1) / world * megabytes * 2**20 / 1e9 / seconds


@command
def main() -> None:
    """Entry of `python -m pipeline.operations.node_check`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.node_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", help="name of a shipped stage, or path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for the reports of all processes of this job")
    arguments = parser.parse_args()
    stage = load_stage(arguments.stage, arguments.overrides)
    ranks = Distributed.from_environment()
    if arguments.report is not None:
        check_process(stage, ranks, arguments.report)
        sys.stdout.flush()
        os._exit(0)  # torch's threads abort now and then when a process group is left the usual way
    with tempfile.TemporaryDirectory() as folder:
        report = check_process(stage, ranks, Path(folder))
        code = print_verdict(decide([report], [report.node]), Path(folder))
    sys.exit(code)


if __name__ == "__main__":
    main()
