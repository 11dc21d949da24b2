"""The checks of every process of a job before step 1: its GPU, its node, and the network to the others.

    srun python -m pipeline.operations.node_check STAGE --report DIR      every process of a job
    python -m pipeline.operations.node_check STAGE                        this machine only

A process writes its report into `rank_00000.json` of a shared folder, waits there for the others, and
connects to them over the network only if all reports are without errors. So a node that never started is
known too. `pipeline.operations.preflight` reads all reports and decides.
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
from model.common.errors import UserError, command, first_line
from pipeline.operations.planning import check_memory
from pipeline.operations.preflight import NodeReport, decide, print_verdict, read_reports
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import StageConfig, cache_root, load_stage
from pipeline.stage.corpus import open_datasets, shares

PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "safetensors")
RENDEZVOUS_SECONDS = 40
"""Time in which all processes have to write their reports, and to connect to each other."""
MEGABYTES = 64
"""Size of the all-reduce that is timed on GPUs; an eighth of it on CPUs."""
MIN_FREE_SHARE = 0.9
"""Share of a GPU's memory that has to be free before training."""


def check_process(stage: StageConfig, ranks: Distributed, folder: Path) -> NodeReport:
    """Check this process's GPU, the node (once per node) and the network; write and return the report."""
    started = time.monotonic()
    report = NodeReport(os.environ.get("SLURMD_NODENAME", socket.gethostname()), ranks.rank, ranks.local_rank)
    report.gpus = torch.cuda.device_count()
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    checks: list[tuple[str, Callable[[], None]]] = [("gpu", lambda: _check_gpu(ranks, per_node))]
    # the node's disks and software are the same for all its processes
    if ranks.local_rank == 0:
        report.versions = versions()
        checks += [
            ("memory", lambda: _check_memory(stage, ranks)),
            ("shm", _check_shared_memory),
            ("run", lambda: _check_writable(stage.run)),
            ("cache", lambda: _check_cache(stage)),
            ("store", lambda: _check_store(stage)),
        ]

    for topic, check in checks:
        try:
            check()
        except (UserError, StoreError, OSError, RuntimeError, ValueError) as error:
            report.errors.append((topic, first_line(error)))
    # already now, because the other processes wait for it before they connect
    report.write(folder)

    # with a bad node the collectives would only wait for their timeout
    if _all_fit(ranks, folder):
        try:
            _check_network(report, ranks, per_node)
        # torch's DistError and DistBackendError are RuntimeErrors
        except (RuntimeError, ValueError) as error:
            report.errors.append(("network", first_line(error)))
    report.seconds = time.monotonic() - started
    report.write(folder)

    return report


def _all_fit(ranks: Distributed, folder: Path) -> bool:
    """True if all processes write their reports within `RENDEZVOUS_SECONDS`, and none reports an error."""
    end = time.monotonic() + RENDEZVOUS_SECONDS
    # files and not collectives, since a collective would not say which node is missing
    while len(list(folder.glob("rank_*.json"))) < ranks.world and time.monotonic() < end:
        time.sleep(0.1)
    reports = read_reports(folder)
    return len(reports) == ranks.world and not any(report.errors for report in reports)


def versions() -> dict[str, str]:
    """Return the versions that have to be equal on all nodes."""
    by_name = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            by_name[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_name[package] = "missing"

    if torch.cuda.is_available():
        by_name["nccl"] = ".".join(map(str, nccl.version()))
        by_name["gpu"] = torch.cuda.get_device_name()
        by_name["driver"] = "unknown"
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            line = driver.read_text().splitlines()[0]
            by_name["driver"] = line.split("Module")[-1].split()[0]

    return by_name


def _check_gpu(ranks: Distributed, per_node: int) -> None:
    """Check that the GPU exists, is free, and multiplies correctly; nothing on a node without GPUs."""
    count = torch.cuda.device_count()
    allocated = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    # a GPU that fell off the bus disappears from torch
    if count < allocated:
        raise UserError(f"the job was given {allocated} GPUs, torch sees {count}: see nvidia-smi on the node")
    if not count:
        return
    if per_node > count:
        raise UserError(f"{per_node} processes for {count} GPUs: one process per GPU")

    device = torch.device("cuda", ranks.local_rank)
    free, total = torch.cuda.mem_get_info(device)
    # a process that outlived an earlier job may keep memory
    if free < MIN_FREE_SHARE * total:
        raise UserError(
            f"GPU {ranks.local_rank}: {(total - free) / 2**30:.0f} of {total / 2**30:.0f} GB "
            "are in use by another process"
        )

    # small whole numbers: every product and sum is exact in bf16's fp32 accumulation
    numbers = torch.arange(2048 * 2048, device=device, dtype=torch.int64).remainder_(3).sub_(1)
    matrix = numbers.reshape(2048, 2048).bfloat16()
    row_sums = (matrix @ matrix).float().sum(1)
    # by the row sums, a product with a vector, which takes a fraction of the time in fp64
    expected = matrix.double() @ matrix.double().sum(1)
    if not torch.equal(row_sums.double(), expected):
        raise UserError(f"GPU {ranks.local_rank}: a matrix product is wrong")


def _check_memory(stage: StageConfig, ranks: Distributed) -> None:
    """Check by the estimate that the stage fits the node's smallest GPU; nothing on a node without GPUs."""
    sizes = [
        torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
    ]
    if sizes:
        check_memory(stage, ranks.world, min(sizes))


def _check_shared_memory() -> None:
    required = float(os.environ.get("PREFLIGHT_SHM_GB", "1"))
    # loader processes pass batches through it; containers often have 64 MB
    size = shutil.disk_usage("/dev/shm").total / 2**30
    if size < required:
        raise UserError(
            f"/dev/shm has {size:.2f} GB, {required:g} are required: enlarge it, or set PREFLIGHT_SHM_GB"
        )


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # a random name, since all nodes write to a shared folder at the same time
    probe = folder / f".preflight-{secrets.token_hex(8)}"
    probe.write_bytes(b"preflight")
    probe.unlink()


def _check_cache(stage: StageConfig) -> None:
    # local stores are read in place, without a cache
    if not any(share.store.startswith("s3://") for share in shares(stage).values()):
        return
    folder = cache_root(stage.data)
    _check_writable(folder)
    required = float(os.environ.get("PREFLIGHT_CACHE_GB", "5"))
    free = shutil.disk_usage(folder).free / 2**30
    if free < required:
        raise UserError(
            f"{folder} has {free:.1f} GB free, {required:g} are required: "
            "empty it, set data.cache, or PREFLIGHT_CACHE_GB"
        )


def _check_store(stage: StageConfig) -> None:
    for dataset in open_datasets(stage):
        if not next(iter(dataset.folders("snapshots/")), None):
            raise UserError(f"{dataset.uri} has no snapshot: run `python -m data_prep snapshot DATASET.yaml`")
    # credentials for reading may not allow writing
    if stage.checkpoint.upload:
        store, key = open_store(stage.checkpoint.upload), f"preflight/{secrets.token_hex(8)}"
        store.put(key, b"preflight")
        store.delete(key)


def _check_network(report: NodeReport, ranks: Distributed, per_node: int) -> None:
    """Connect all processes, read the clock, and time all-reduces."""
    device = torch.device("cuda", ranks.local_rank) if report.gpus else torch.device("cpu")
    if report.gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if report.gpus else "gloo"
    timeout = timedelta(seconds=RENDEZVOUS_SECONDS)
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timeout)

    dist.all_reduce(torch.ones(1, device=device))
    if report.gpus:
        torch.cuda.synchronize()
    # right after the first collective, all processes are at the same point in time
    report.clock = time.time()

    # each process has to create all groups, also those of other nodes
    groups = [list(range(first, first + per_node)) for first in range(0, ranks.world, per_node)]
    if 1 < per_node < ranks.world:
        own = [dist.new_group(group) for group in groups][ranks.rank // per_node]
        report.node_bandwidth = _bandwidth(own, per_node, device)
    report.bandwidth = _bandwidth(None, ranks.world, device)
    dist.barrier()
    dist.destroy_process_group()


def _bandwidth(group: Any, world: int, device: torch.device) -> float:
    """Return GB/s over each process's link in a ring all-reduce: the mean of three, after one to warm up."""
    megabytes = MEGABYTES if device.type == "cuda" else MEGABYTES // 8
    # 2^18 fp32 values are 1 MiB
    data = torch.zeros(megabytes * 2**18, device=device)
    dist.all_reduce(data, group=group)

    started = time.monotonic()
    for _ in range(3):
        dist.all_reduce(data, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / 3

    return 2 * (world - 1) / world * megabytes * 2**20 / 1e9 / seconds


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.node_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", help="name of a shipped stage, or path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="folder of the reports of this job's processes"
    )
    arguments = parser.parse_args()

    stage = load_stage(arguments.stage, arguments.overrides)
    ranks = Distributed.from_environment()
    if arguments.report is not None:
        check_process(stage, ranks, arguments.report)
        sys.stdout.flush()
        os._exit(0)  # after the interpreter's own exit, torch's threads sometimes abort
    with tempfile.TemporaryDirectory() as folder:
        report = check_process(stage, ranks, Path(folder))
        code = print_verdict(decide([report], [report.node]), Path(folder))
    sys.exit(code)


if __name__ == "__main__":
    main()
