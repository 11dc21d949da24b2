"""Training on one machine without Slurm: one `python -m pipeline.train` per rank, as with srun."""

import os
import subprocess
import sys
from collections.abc import Callable

from pipeline.runtime.distributed import free_port


def start_ranks(count: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Start `count` ranks of `python -m pipeline.train ARGUMENTS` that share this machine's cores."""
    # chosen here, since all ranks have to know the same one
    port = free_port()
    # ranks that each use all cores would slow each other down
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.train", *arguments],
            env={
                # before the environment, so that a user's own setting wins
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(count)
    ]


def wait_for(
    ranks: list[subprocess.Popen[bytes]], *good: int, meanwhile: Callable[[], None] = lambda: None
) -> int:
    """Wait until all ranks have exited. If one fails, kill the others.

    Args:
        ranks: processes of `start_ranks`.
        good: exit codes of success.
        meanwhile: called several times per second while a rank is running.

    Returns:
        One of the `good` exit codes, or that of the first rank that failed.
    """
    running = list(ranks)
    while running:
        for rank in [rank for rank in running if rank.poll() is not None]:
            running.remove(rank)
            if rank.returncode not in good:
                # their collectives would wait for the failed rank until the timeout
                for other in running:
                    other.kill()
                return rank.returncode

        if running:
            meanwhile()
            try:
                # a wait with a timeout, so that `meanwhile` runs and the failure of any rank is seen soon
                running[0].wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    return ranks[0].returncode
