"""The amount of work that fits into a demo's time, from the speed of the first steps."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from model.common.records import STRICT
from pipeline.stage.config import StageConfig

VAE_SHARE, END_SHARE = 0.15, 0.14
"""Shares of the time in which the VAE is trained, and in which images are generated and measured."""
SPEED_STEPS = 20
"""Steps that show the speed of training. The second half of them counts, since the first steps are slower."""
MIN_IMAGES, MAX_IMAGES = 8, 256
"""Number of images: as many as fit into the time, since the measured share then has a smaller error."""
END_STARTS = 3.5
"""Time that generating and measuring take whatever the number of images, in starts of the training: they load
the network, its LLMs and the training images."""
RESERVE_SECONDS = 15.0
"""Start of the demo itself, and its report."""
DRAWING_FACTOR = 8.0
"""Time of a forward pass of one image in one process, compared with its time in a training batch of all
processes (`benchmarks/results/first_minutes.md`)."""


@dataclass(frozen=True)
class Plan:
    """Amount of work, fixed before training starts: a demo that is stopped goes on with the same plan."""

    __pydantic_config__ = STRICT

    minutes: float
    samples: Annotated[int, Field(ge=1, lt=1 << 62)]
    """Length of the training."""
    images: Annotated[int, Field(ge=1, lt=1 << 31)]
    """Images that are generated at the end."""


def make_plan(minutes: float, spent: float, trial: float, rate: float, stage: StageConfig) -> Plan:
    """Return what fits into the time that is left.

    Args:
        minutes: time of the whole demo.
        spent: seconds of the phases before, the trial included.
        trial: seconds of the trial of `SPEED_STEPS` steps, from its start to its exit.
        rate: samples per second in the trial's steps.
        stage: the stage; its own number of samples is not read.
    """
    start = max(0.0, trial - SPEED_STEPS * stage.global_batch / rate)
    end = END_SHARE * 60 * minutes
    # the training starts twice, since it is stopped half-way
    left = 60 * minutes - RESERVE_SECONDS - spent - 2 * start - end
    # two steps at least, so that there is a place to stop at
    steps = max(2, int(left * rate) // stage.global_batch)

    # a sample in training takes about as long as three forward passes
    passes = stage.sample.steps * (1 if stage.sample.guidance == 1 else 2)
    seconds_per_image = passes / (3 * rate) * DRAWING_FACTOR
    images = int((end - END_STARTS * start) / seconds_per_image)

    return Plan(minutes, steps * stage.global_batch, min(max(images, MIN_IMAGES), MAX_IMAGES))
