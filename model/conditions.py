"""Conditions of the network beside timestep and text, such as the size of the training image: a class each,
by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from model.common.registry import Registry
from model.config import DiTConfig
from model.costs import LayerCost, linear
from model.functional import timestep_features
from model.layers import ConditionEmbedding, ZeroLinear


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


@CONDITIONS.register("guidance")
class GuidanceCondition(ExtraCondition):
    """The scale of guidance that the prediction is to have already, for networks distilled from guided ones
    (as in HunyuanVideo): training on data alone gives every sample 1, the network without guidance."""

    def __init__(self, sizes: DiTConfig) -> None:
        super().__init__(sizes)
        self.frequency_width = sizes.frequency_width
        self.mlp = ConditionEmbedding(sizes.frequency_width, sizes.width)
        self.out = ZeroLinear(sizes.width, sizes.width)

    def forward(self, values: Tensor) -> Tensor:
        """Embed scales fp32 [B] as [B, D], by sinusoids like those of a timestep."""
        features = timestep_features(values, self.frequency_width)
        return self.out(self.mlp(features.to(self.out.weight.dtype)))

    @classmethod
    def costs(cls, sizes: DiTConfig) -> Iterator[LayerCost]:
        """Yield the cost of each layer."""
        yield linear(sizes.frequency_width, sizes.width, 1)
        yield linear(sizes.width, sizes.width, 1)
        yield linear(sizes.width, sizes.width, 1)

    @classmethod
    def from_batch(cls, batch: Any) -> Tensor:
        """Return 1 for each sample."""
        return torch.ones_like(batch.u)

    @classmethod
    def for_sampling(cls, height: int, width: int, given: str | None) -> Tensor:
        """Return the scale that was asked for (`--condition guidance=6`), 1 by default.

        Raises:
            UserError: if it is not a number from 0 to 1,000.
        """
        try:
            scale = 1.0 if given is None else float(given)
        except ValueError:
            scale = math.nan
        if not 0.0 <= scale <= 1_000.0:
            raise UserError(f"--condition guidance={given}: give a number from 0 to 1,000")
        return torch.tensor(scale)
