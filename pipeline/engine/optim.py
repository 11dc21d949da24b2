"""Optimizers by name, the parameter groups that they train, and the learning-rate schedule.

To add an optimizer, write a file with an `OptimizerSettings` under `@OPTIMIZERS.register("its_name")` and
import it in `pipeline/engine/__init__.py`. The engine, the checkpoints and `pipeline.estimate` ask the
registered class for all they need.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from model.common.registry import Registry
from model.common.settings import settings_from
from pipeline.engine.layout import Layout
from pipeline.engine.lazy import LAZY, is_table
from pipeline.stage.config import OptimConfig

DECAY, NO_DECAY = "decay", "no_decay"
_UNDECAYED = ("gate", "modulation")
"""Modules whose weights start at zero and scale a sub-layer's output: weight decay would keep them there."""


class OptimizerSettings:
    """Base class of an optimizer's settings; subclasses are dataclasses whose fields a stage can set.

    A field that `OptimConfig` has too (`betas`, `eps`, `momentum`, ...) takes its value from there, any other
    from `optim.settings`.
    """

    moments: ClassVar[dict[str, tuple[str, ...]]] = {DECAY: (), NO_DECAY: ()}
    """Parameter groups, in order, and the names under which the optimizer keeps their moments in its state.

    A moment is an fp32 tensor of the parameter's shape that is zero before the first step."""
    zero_stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    """ZeRO stages that the optimizer works with; one that updates each element by itself works with all."""

    def group(self, name: str, shape: Sequence[int]) -> str:
        """Return the group, a key of `moments`, of the parameter `name`: here, only matrices decay."""
        return DECAY if decays(name, shape) else NO_DECAY

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer that DeepSpeed wraps.

        Args:
            groups: parameter groups with `params`, `name`, `lr` and `weight_decay`.
        """
        raise NotImplementedError

    def bind(self, optimizer: torch.optim.Optimizer, layout: Layout, masters: Sequence[Tensor]) -> None:
        """Give `optimizer` the places of parameters in this rank's flat `masters`; most do not need them."""


OPTIMIZERS: Registry[type[OptimizerSettings]] = Registry("optim.name")


def optimizer_settings(config: OptimConfig) -> OptimizerSettings:
    """Return the settings of the optimizer that `config` names.

    Raises:
        UserError: if the name is unknown, or if a key of `optim.settings` is unknown, missing, or has the
            wrong type or is out of range.
    """
    schema: Any = OPTIMIZERS[config.name]
    names = [field.name for field in fields(schema)]
    shared = {name: getattr(config, name) for name in names if hasattr(config, name)}

    # Two places for one setting would leave it open which of them counts.
    for key in config.settings:
        if key in shared:
            raise UserError(
                f"optim.settings.{key}: {config.name} reads it from optim.{key}: set that instead"
            )
        if key not in names:
            known = ", ".join(name for name in names if name not in shared) or "none"
            raise UserError(
                f"optim.settings.{key}: unknown for optim.name={config.name}, whose own settings are: {known}"
            )

    return settings_from(schema, {**shared, **config.settings}, "optim.settings")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trained parameters into the optimizer's groups; groups without parameters are left out.

    Every parameter that requires a gradient is in exactly one group. Works on partitioned parameters and on
    the meta device too.

    Args:
        model: the network.
        config: names the optimizer; the learning rate and the weight decay of its groups.

    Returns:
        Parameter groups as torch's optimizers take them, each with `params`, `name`, `lr` and `weight_decay`;
        tables are in a group of their own, with `LAZY`, in which what has no gradient does not move.

    Raises:
        UserError: if no parameter requires a gradient.
    """
    optimizer = optimizer_settings(config)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in optimizer.moments}
    tables = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_table(name):
            tables.append(parameter)
        else:
            # A partitioned parameter is empty; its shape is `ds_shape`.
            members[optimizer.group(name, getattr(parameter, "ds_shape", parameter.shape))].append(parameter)

    groups = [
        {
            "params": params,
            "name": name,
            "lr": config.lr,
            "weight_decay": 0.0 if name == NO_DECAY else config.weight_decay,
        }
        for name, params in members.items()
        if params
    ]
    if tables:
        groups.append({"params": tables, "name": NO_DECAY, "lr": config.lr, "weight_decay": 0.0, LAZY: True})
    if not groups:
        raise UserError("the network has no parameter that requires a gradient: unfreeze some")
    return groups


def decays(name: str, shape: Sequence[int]) -> bool:
    """Return True for matrices and convolutions; norms, biases, gates and modulations do not decay."""
    return len(shape) >= 2 and not any(word in part for part in name.split(".") for word in _UNDECAYED)


def learning_rate(config: OptimConfig, samples: int, total: int) -> float:
    """Return the learning rate of the step that starts after `samples` of `total` samples.

    Linear warm-up over `warmup_samples`, then constant, or cosine or linear decay to `final_lr * lr` at
    `total`.
    """
    if samples < config.warmup_samples:
        # Never 0: a first step at rate 0 would only fill the moments.
        return config.lr * (samples + 1) / (config.warmup_samples + 1)
    if config.schedule == "constant":
        return config.lr

    progress = min(1.0, (samples - config.warmup_samples) / max(1, total - config.warmup_samples))
    # The share of the way to `final_lr` that is left.
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * remaining)
