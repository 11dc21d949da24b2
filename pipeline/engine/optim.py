"""Parameter groups, and the learning rate as a function of the samples seen."""

import math
from dataclasses import dataclass

from torch import nn

from model.common.errors import UserError
from pipeline.engine.muon import MUON
from pipeline.stage.config import OptimConfig

_UNDECAYED = ("gate", "modulation")
"""Modules whose weights start at zero and set how much of a sub-layer enters: decay would hold them there."""


@dataclass(frozen=True)
class Group:
    """Parameters that share the optimizer's settings."""

    name: str
    parameters: list[nn.Parameter]
    weight_decay: float


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool = False) -> list[Group]:
    """Split the trained parameters: matrices decay; norms, biases, gates and modulations do not.

    Every parameter that requires a gradient is in exactly one group. Works on partitioned parameters too.

    Args:
        model: the network.
        weight_decay: of the matrices.
        muon: put the blocks' matrices into a group of their own. First and last layers and embeddings stay out of it.

    Raises:
        UserError: nothing is left to train.
    """
    split: dict[str, list[nn.Parameter]] = {MUON: [], "decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            decays = _decays(name, dimensions)
            in_block = muon and decays and dimensions == 2 and "blocks" in name.split(".")
            split[MUON if in_block else "decay" if decays else "no_decay"].append(parameter)
    groups = [Group(name, members, 0.0 if name == "no_decay" else weight_decay) for name, members in split.items()]
    groups = [group for group in groups if group.parameters]
    if not groups:
        raise UserError("the network has no parameter that requires a gradient: unfreeze some")
    return groups


def _decays(name: str, dimensions: int) -> bool:
    return dimensions >= 2 and not any(word in part for part in name.split(".") for word in _UNDECAYED)


def learning_rate(config: OptimConfig, samples: int, total: int) -> float:
    """Learning rate of the step that starts after `samples` of `total` samples.

    Linear warm-up over `warmup_samples`, then constant, or cosine or linear down to `final_lr * lr` at `total`.
    """
    if samples < config.warmup_samples:
        return config.lr * (samples + 1) / (config.warmup_samples + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (samples - config.warmup_samples) / max(1, total - config.warmup_samples))
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)
