"""Joining the run's process group, and leaving it."""

import gc
import os
import shutil
import sys
import sysconfig
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from model.common.errors import UserError
from pipeline.runtime.distributed import Distributed


def join_process_group(timeout_minutes: int) -> Distributed:
    """Join the run's process group, unless this process has done so; ranks come from torchrun, Slurm, or are one.

    Args:
        timeout_minutes: how long a collective waits for a rank before the run ends.

    Raises:
        UserError: this machine lacks what DeepSpeed compiles its CPU extension with, or the ranks are inconsistent.
    """
    ranks = Distributed.from_environment()
    if torch.cuda.is_available():
        # a task that Slurm gave one GPU sees it as number 0, whatever its local rank is
        device = ranks.local_rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    elif not dist.is_initialized():
        _check_compiler()
    deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))
    return ranks


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{compiler} not found, with which DeepSpeed compiles a small extension on CPU: apt-get install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError("Python.h not found, with which DeepSpeed compiles a small extension on CPU: apt-get install python3-dev")


def exit_process(code: int) -> None:
    """End this process with `code`, after the other ranks have come here too.

    The interpreter's own exit aborts now and then while gloo or NCCL threads still run, so it is not taken.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
