"""Ranks that fail or hang on purpose; each writes its stderr into a log as on a cluster."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model.common.errors import UserError
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.watchdog import Heartbeat, Watchdog


def log_to(folder):
    rank = Distributed.from_environment().rank
    sys.stderr = (Path(folder) / f"rank_{rank:05d}.txt").open("w", buffering=1)
    return rank


def steps(rank, heartbeat, what, who, folder):
    """Steps for ever, with an all-reduce in each; in step 3, rank `who` does `what`."""
    step = 0
    while True:
        heartbeat.enter("data", step)
        if (step, rank) == (3, who):
            if what == "raise":
                raise RuntimeError("on purpose")
            if what == "user error":
                raise UserError("this and that: change\nthem")
            if what == "sleep":
                time.sleep(1000)
            if what == "wait to be stopped":
                (Path(folder) / "here").touch()
                time.sleep(1000)
        heartbeat.enter("step", step)
        dist.all_reduce(torch.ones(()))
        step += 1


def watched(folder, what, who, stuck_seconds):
    rank, heartbeat = log_to(folder), Heartbeat()
    watchdog = Watchdog(Distributed.from_environment(), heartbeat, stuck_seconds, interval=0.1)
    try:
        steps(rank, heartbeat, what, who, folder)
    except BaseException as error:
        watchdog.fail(error)


def command(folder, stage):
    """`python -m pipeline.train` whose training fails on rank 1."""
    from pipeline import train  # seconds, which the other tasks do not need

    rank = log_to(folder)

    class FailingTrainer:
        def __init__(self, stage, ranks, stop, heartbeat):
            self.heartbeat = heartbeat

        def run(self):
            steps(rank, self.heartbeat, "raise", 1, folder)

    train.Trainer = FailingTrainer
    sys.argv = ["train", stage]
    train.main()
