"""Conditions of the network beside timestep and text, such as the size of the training image: a class each,
by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from model.common.registry import Registry
from model.config import DiTConfig
from model.costs import LayerCost


class ExtraCondition(nn.Module, ABC):
    """Embeds one value per sample; the embedding is added to that of timestep and text, which every block
    reads.

    End with a `ZeroLinear`, so that a network that gets the condition in a later stage starts as it was. A
    class serves training and sampling alike: `from_batch` takes the values from the training data,
    `for_sampling` from the request.
    """

    def __init__(self, sizes: DiTConfig) -> None:
        """Build the embedding for a DiT of these sizes."""
        super().__init__()

    @abstractmethod
    def forward(self, values: Tensor) -> Tensor:
        """Embed values [B, ...] as [B, D]."""

    @classmethod
    @abstractmethod
    def costs(cls, sizes: DiTConfig) -> Iterator[LayerCost]:
        """Yield the cost of each layer."""

    @classmethod
    @abstractmethod
    def from_batch(cls, batch: Any) -> Tensor:
        """Return the values [B, ...] of a training batch (`pipeline.data.batch.Batch`), on its device."""

    @classmethod
    @abstractmethod
    def for_sampling(cls, height: int, width: int, given: str | None) -> Tensor:
        """Return the value [...] of an image of `height` x `width` pixels.

        Args:
            height: of the image.
            width: of the image.
            given: what the user asked for (`--condition NAME=VALUE`), or None for the default.

        Raises:
            UserError: if `given` is not a value of the condition.
        """


CONDITIONS: Registry[type[ExtraCondition]] = Registry("model.conditions")
"""Conditions by the names that `model.conditions` lists."""
