"""Joining the run's process group, and leaving it."""

import gc
import os
import sys
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from model.common.errors import UserError, first_line
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.heap import keep_freed_memory


def join_process_group(timeout_minutes: int) -> Distributed:
    """Join the run's process group, if this process has not; without torchrun or Slurm it is the only one.

    Args:
        timeout_minutes: how long a collective waits for a rank before the run ends.

    Raises:
        UserError: if the environment's variables contradict each other, or ranks are missing.
    """
    # Read first, since the ranks are then exported under torchrun's names.
    launched = "WORLD_SIZE" if "RANK" in os.environ else "SLURM_STEP_NUM_TASKS"
    launched += f"={os.environ.get(launched, '1')}"
    ranks = Distributed.from_environment()

    if torch.cuda.is_available():
        # A task to which Slurm gave one GPU sees it as number 0, whatever its local rank is.
        device = ranks.local_rank % torch.cuda.device_count()
        # DeepSpeed reads the variable itself, and would choose a device that this process does not see.
        os.environ["LOCAL_RANK"] = str(device)
        # Before the process group: NCCL otherwise binds every rank of a node to device 0.
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()

    # An all-reduce for inference on the CPU, which nothing here calls; compiling it takes a minute and a C++
    # compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))
    except dist.DistStoreError as error:
        raise UserError(
            f"not all of {ranks.world} processes have come within {timeout_minutes} minutes "
            f"({first_line(error)}): {launched} says that there are as many; in a shell of `srun --pty`, "
            "unset SLURM_STEP_ID to start one process, or start them with srun or torchrun"
        ) from error
    except dist.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {place} ({first_line(error)}): name another port by MASTER_PORT, "
            "or end the program that has this one"
        ) from error
    return ranks


def exit_process(code: int) -> None:
    """End this process with `code` once all ranks have called this function.

    It skips the interpreter's shutdown, which sometimes aborts while gloo or NCCL threads still run.
    """
    # Objects with threads or collectives in their finalizers end while the process group still exists.
    gc.collect()
    if dist.is_initialized():
        # A rank that leaves early would look like a failed peer to the others.
        dist.barrier()
        dist.destroy_process_group()
    # `os._exit` flushes nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
