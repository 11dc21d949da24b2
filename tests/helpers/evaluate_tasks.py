"""`python -m pipeline.evaluate` as one of several processes, which may be killed at a chosen image or
answer."""

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
    """Return a function that kills the process with SIGKILL once it has been called `count` times."""
    calls = iter(range(count))

    def counted(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    return counted


def run(rank, world, port, truth, arguments, images=None, answers=None):
    """Run as `rank` of `world` processes that connect through a port; killed after that many images or
    answers."""
    torch.set_num_threads(1)
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    save, opened = bench_images.save_image, bench_answers.open_image
    with (
        patch.object(sys, "argv", ["evaluate", *map(str, arguments)]),
        patch.object(evaluate, "load_source", lambda *_: make_sampler()),
        patch.object(evaluate, "ScorerModels", lambda *_: make_judges(truth)),
        patch.object(bench_images, "save_image", save if images is None else killed_after(images, save)),
        patch.object(
            bench_answers, "open_image", opened if answers is None else killed_after(answers, opened)
        ),
    ):
        evaluate.main()
