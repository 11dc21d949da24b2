"""The interface of adapters: small modules that are trained beside a frozen network."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.common.registry import Registry
from model.condition import Condition

if TYPE_CHECKING:
    from model.dit import LIDiT

ADAPTERS_PREFIX = "adapters."
"""Adapters are children of the network's `adapters`; those inside a layer have one of `INNER` in their
names."""
INNER = ("lora_A", "lora_B")


@dataclass
class Shifts:
    """Additions of adapters to what the blocks read."""

    condition: Tensor | None = None
    """[B, D], added to the condition of all blocks and of the last layer."""
    text: Tensor | None = None
    """[B, S, D], added to the text tokens that every block reads."""
    text_of_blocks: Sequence[Tensor] = field(default_factory=tuple)
    """[B, S, D] each, added to those of one block."""

    def shifted_condition(self, c: Tensor) -> Tensor:
        """Return the shifted condition: [B, D], or [B, N or K, D] with times of its own for each patch."""
        if self.condition is None:
            return c
        return c + (self.condition if c.dim() == 2 else self.condition[:, None])

    def shifted_text(self, text: Tensor, block: int) -> Tensor:
        """Return the text tokens [B, S, D] that block number `block` (from 0) reads."""
        if self.text is not None:
            text = text + self.text
        return text + self.text_of_blocks[block] if self.text_of_blocks else text


class Adapter(nn.Module, ABC):
    """An addition to a network whose own parameters stay as they are.

    It begins as no change at all: end each path with a layer that starts at zero.
    """

    @abstractmethod
    def shifts(self, text: Tensor, condition: Condition) -> Shifts | None:
        """Return what the blocks are to read in addition; None = nothing.

        In training it must run the same modules for every batch: ZeRO-3 gathers their parameters from all
        ranks.

        Args:
            text: fused text tokens [B, S, D].
            condition: of the batch.
        """


def find_shifts(adapters: nn.ModuleDict, text: Tensor, condition: Condition) -> list[Shifts]:
    """Return the shifts of all adapters that have any; arguments as `Adapter.shifts`."""
    found = []
    for adapter in adapters.values():
        assert isinstance(adapter, Adapter)
        shifts = adapter.shifts(text, condition)
        if shifts is not None:
            found.append(shifts)
    return found


def entered(x: Tensor, training: bool) -> Tensor:
    """Return what the first block reads, with a gradient in training.

    Below a frozen network it would have none, and by the gradients of a block's inputs ZeRO-3 sees when the
    backward pass is through with the block.
    """
    if not training or not torch.is_grad_enabled() or x.requires_grad:
        return x
    return x.detach().requires_grad_()


ADAPTERS: Registry[type[Adapter]] = Registry("adapter")
"""Adapters that have a module of their own, by the stage's key that describes them."""


def is_adapter(name: str) -> bool:
    """Return True if the parameter `name` of a network belongs to an adapter."""
    return name.startswith(ADAPTERS_PREFIX) or any(part in INNER for part in name.split("."))


def adapter_names(network: nn.Module) -> Iterator[str]:
    """Yield the names of a network's parameters that belong to adapters."""
    return (name for name, _ in network.named_parameters() if is_adapter(name))


def freeze_base(network: "LIDiT") -> None:
    """Freeze all parameters but those of adapters; partitioned ones too."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))
