"""Processes of a benchmark that train together on this machine."""

import os

import torch


def join_group(rank: int, processes: int, port: int) -> None:
    """Make this process one of several, as a launcher would, with its share of the cores.

    Args:
        rank: number of this process.
        processes: number of all of them.
        port: TCP port at which they meet, the same in all.
    """
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }

    os.environ.update({name: str(value) for name, value in values.items()})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
