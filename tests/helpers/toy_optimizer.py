"""An optimizer from outside the package: SGD with momentum, with one moment and a setting of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.engine.optim import DECAY, NO_DECAY, OPTIMIZERS, OptimizerSettings
from tests.helpers import checkpoint_tasks, engine_tasks

NAME = "toy_sgd"


@OPTIMIZERS.register(NAME)
@dataclass
class ToySettings(OptimizerSettings):
    momentum: float
    nesterov: bool = True

    moments: ClassVar = {DECAY: ("momentum_buffer",), NO_DECAY: ("momentum_buffer",)}

    def build(self, groups):
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov)


# The ranks of a test import this file, and so register the optimizer, because these functions are defined in
# it.


def train_like_ddp(*args):
    return engine_tasks.train_like_ddp(*args)


def held_bytes(*args):
    return engine_tasks.held_bytes(*args)


def train_and_save(*args):
    return checkpoint_tasks.train_and_save(*args)


def resume(*args):
    return checkpoint_tasks.resume(*args)
