"""The rank of this process, and the few collectives outside the engine.

Nothing here imports torch at the top: importing it takes seconds, and ranks are read and signal handlers set
before.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from model.common.errors import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Distributed:
    """Rank of this process: one process per GPU, or any number of processes on the CPU."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Distributed":
        """Read the variables of torchrun or a Slurm step, and export those that torch and DeepSpeed read.

        Without either, this process is alone. A Slurm batch script is not a step, so a command in it without
        `srun` runs alone.

        Raises:
            UserError: if torchrun's variables are incomplete, or the rank is not below the world size.
        """
        # before Slurm: torchrun may itself run inside a Slurm step, one per node
        if "RANK" in os.environ:
            missing = [name for name in _TORCHRUN if name not in os.environ]
            if missing:
                raise UserError(
                    f"RANK is set but {', '.join(missing)} not: start with torchrun or srun, or unset RANK"
                )
            ranks = cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        elif "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
            ranks = cls(
                # the step's own number of tasks: the job may have more than this `srun` starts
                *(int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
            )
        else:
            ranks = cls(0, 1, 0)
        # variables of an earlier launch may be left over in the shell
        if not 0 <= ranks.rank < ranks.world:
            raise UserError(
                f"rank {ranks.rank} of {ranks.world}: the launcher's environment is inconsistent, "
                "unset RANK and WORLD_SIZE"
            )
        # DeepSpeed reads the environment itself and knows nothing of Slurm
        ranks._export()
        return ranks

    @property
    def device(self) -> "torch.device":
        """This process's GPU, or the CPU."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Slurm may give each task a single visible GPU, which is number 0 then
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def _export(self) -> None:
        """Set the variables that torch's and DeepSpeed's `env://` rendezvous reads."""
        values = (self.rank, self.world, self.local_rank)
        os.environ.update({name: str(value) for name, value in zip(_TORCHRUN, values, strict=True)})
        # a process alone needs a rendezvous too, and several of them may run on one machine
        if self.world == 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            if "MASTER_PORT" not in os.environ:
                os.environ["MASTER_PORT"] = str(free_port())
            return

        # only defaults, since cluster/train.sh exports a port of its own for each start
        for name, value in slurm_rendezvous(os.environ).items():
            os.environ.setdefault(name, value)
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError(
                "MASTER_ADDR or MASTER_PORT is not set: export the first node's name and a free port, "
                "as cluster/train.sh does"
            )


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the first node of a Slurm step and a port of its job, as MASTER_ADDR and MASTER_PORT.

    Returns:
        An empty dictionary outside of Slurm.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)  # `gpu[07-09,12]` or `n1,n2`
    if first is None:
        return {}
    # jobs on one node get different ports without talking to each other
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    return {"MASTER_ADDR": first[1] + (first[2] or ""), "MASTER_PORT": str(port)}


def free_port() -> int:
    """Return a TCP port of this machine that no process listens on."""
    with socket.socket() as probe:
        # port 0 lets the kernel choose
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ensure_process_group(ranks: Distributed) -> None:
    """Join a process group on the CPU, unless this process runs alone or has joined one."""
    import torch.distributed as dist

    if ranks.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def all_reduce_min(value: int, group: "dist.ProcessGroup | None" = None) -> int:
    """Return the smallest of all ranks' values, such as whether all have succeeded. Collective."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    # NCCL can only reduce tensors on a GPU
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    number = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN, group=group)
    return int(number.item())


def gather(value: Any, group: "dist.ProcessGroup | None" = None) -> list[Any]:
    """Return all ranks' small values in rank order, on every rank. Collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def first_failure(failure: str) -> str:
    """Return the failure of the first rank that has one, or "". Collective.

    It uses a process group of its own on the CPU, so it does not interfere with other collectives. A rank may
    arrive half an hour after the others.

    Args:
        failure: description of this rank's failure; "" = none.

    Raises:
        RuntimeError: if a rank has exited, or does not arrive.
    """
    import torch.distributed as dist

    rank, world = rank_and_world()
    if world == 1:
        return failure
    group = _cpu_group(dist.group.WORLD)
    # the lowest rank that failed, or `world` if none did
    first = all_reduce_min(rank if failure else world, group)
    return f"{gather(failure, group)[first]} (on rank {first})" if first < world else ""


# cached, since every new group costs a rendezvous of all ranks
@lru_cache(maxsize=1)
def _cpu_group(world: object) -> "dist.ProcessGroup":
    """Return a gloo group of all ranks; the process group `world` is the key of the cache."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(minutes=30))  # pyright: ignore[reportReturnType]


def rank_and_world(from_environment: bool = False) -> tuple[int, int]:
    """Return this process's rank and the number of processes.

    Args:
        from_environment: without a process group, take RANK and WORLD_SIZE if they are set, instead of (0,
            1).
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if from_environment:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return 0, 1
