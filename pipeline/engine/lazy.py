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
    """Make the optimizer leave elements of lazy groups as they are where their gradient is exactly zero.

    A step sees the other elements alone, which are few: copies of all that stay would take as much memory as
    the table and its moments.
    """
    narrowed: list[_Narrowed] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        narrowed.clear()
        for group in optimizer.param_groups:
            if group.get(LAZY):
                parameters = (each for each in group["params"] if each.grad is not None)
                narrowed.extend(_Narrowed(parameter, optimizer.state[parameter]) for parameter in parameters)

    def after(_: Any, args: Any, kwargs: Any) -> None:
        for parameter in narrowed:
            parameter.restore()
        narrowed.clear()

    optimizer.register_step_pre_hook(torch.no_grad()(before))
    optimizer.register_step_post_hook(torch.no_grad()(after))


class _Narrowed:
    """A parameter that for one step consists of its elements with a gradient, as do its moments."""

    def __init__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Narrow the parameter, its gradient, and the state of its shape."""
        assert parameter.grad is not None
        self._parameter, self._state = parameter, state
        self._values, self._gradient = parameter.data, parameter.grad
        self._present = self._gradient.flatten().nonzero().flatten()
        self._moments = {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
        }

        parameter.grad = None
        parameter.data = self._values.flatten()[self._present]
        parameter.grad = self._gradient.flatten()[self._present]
        for name, value in self._moments.items():
            state[name] = value.flatten()[self._present]

    def restore(self) -> None:
        """Put what the step has made of the elements in their places."""
        parameter, moved = self._parameter, self._parameter.data
        parameter.grad = None
        parameter.data = self._values
        parameter.grad = self._gradient
        self._put(self._values, moved)
        for name, value in self._state.items():
            # Moments that the first step has made get their whole shape.
            if isinstance(value, Tensor) and value.dim() and value.shape == moved.shape:
                whole = self._moments.get(name)
                self._state[name] = torch.zeros_like(self._values) if whole is None else whole
                self._put(self._state[name], value)

    def _put(self, whole: Tensor, part: Tensor) -> None:
        whole.view(-1)[self._present] = part
