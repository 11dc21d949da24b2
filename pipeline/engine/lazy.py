"""Rows of tables that move only in steps whose batch has them.

A row that no sample reads has a gradient of zero, but moments of earlier steps would still move it, and it
would forget them: users with few images would drift with the number of all others. As in torch's SparseAdam,
weights and moments of such rows stay as they are.
"""

from typing import Any

import torch
from torch import Tensor

LAZY = "lazy"
"""Key of parameter groups whose elements without a gradient do not move."""
TABLES = ("table",)
"""Modules whose weights are tables: a row for each of many things, of which a batch has a few."""


def is_table(name: str) -> bool:
    """Return True if the parameter `name` is a table."""
    return any(part in TABLES for part in name.split("."))


def hold_absent_rows(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer leave elements of lazy groups as they are where their gradient is exactly zero."""
    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        held.clear()
        for group in optimizer.param_groups:
            if not group.get(LAZY):
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue

                absent = parameter.grad == 0
                for values in _moving(optimizer, parameter):
                    held.append((values, absent, values[absent]))

    def after(_: Any, args: Any, kwargs: Any) -> None:
        for values, absent, kept in held:
            values[absent] = kept
        held.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(torch.no_grad()(after))


def _moving(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return what a step changes of a parameter: its values, and moments of its shape."""
    moments = [
        value
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    return [parameter.detach(), *moments]
