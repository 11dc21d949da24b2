"""`python -m pipeline.evaluate` as one of several processes, which may be killed at a picture or an answer of one's choice."""

import os
import signal
import sys
from unittest.mock import patch

import torch

from pipeline import evaluate
from pipeline.evaluation import answers as bench_answers
from pipeline.evaluation import images as bench_images
from tests.helpers.fake_bench import make_judges
from tests.helpers.tiny_sampler import make_sampler


def killed_after(count, function):
    """A function that ends the process, as SIGKILL does, once it has been called `count` times."""
    calls = iter(range(count))

    def counted(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return counted


def run(rank, world, port, truth, arguments, pictures=None, answers=None):
    """This process as `rank` of `world` that meet at a port; killed after so many pictures or answers."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    save, opened = bench_images._save, bench_answers._open
    with (
        patch.object(sys, "argv", ["evaluate", *map(str, arguments)]),
        patch.object(evaluate, "load_source", lambda *_: make_sampler()),
        patch.object(evaluate, "ScorerModels", lambda *_: make_judges(truth)),
        patch.object(bench_images, "_save", save if pictures is None else killed_after(pictures, save)),
        patch.object(bench_answers, "_open", opened if answers is None else killed_after(answers, opened)),
    ):
        evaluate.main()
