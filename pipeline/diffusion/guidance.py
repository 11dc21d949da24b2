"""The network with classifier-free guidance (Ho and Salimans 2022), as solvers call it."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.condition import Condition, Predict
from model.sub_network import Part


class Guided:
    """Evaluates the network, both branches of guidance in one batch.

    On the CPU each image is a batch of its own. There, two operations depend on the other images of a batch:
    matrix products of few rows (of the conditions, one row per image) and attention to padded texts; both sum
    in another order for other shapes. Batches gain nothing on the CPU, where one image's patches fill a
    product.
    """

    def __init__(
        self, predict: Predict, condition: Condition, null_condition: Condition, guidance: float
    ) -> None:
        """Put the branches into batches, once for all steps.

        Args:
            predict: the network.
            condition: texts and further conditions of the prompts; its timesteps are not read.
            null_condition: the same of the null or the negative captions; not read at guidance 1.
            guidance: 1 = none.
        """
        self.predict, self.guidance, self._condition = predict, guidance, condition
        # Without guidance the second branch would only double the work.
        branches = [condition] if guidance == 1.0 else [condition, null_condition]
        self.branches = len(branches)
        # An elastic network may evaluate the branches with parts of itself that differ.
        self.null_part = null_condition.part
        self.parts_differ = self.branches == 2 and condition.part != null_condition.part
        if condition.texts[0].states.device.type == "cpu":
            self.batches: list[Condition] = []
            for image in range(len(condition.timesteps)):
                self.batches.append(Condition.concatenate([branch.row(image) for branch in branches]))
        else:
            self.batches = [Condition.concatenate(branches)]

    def __call__(self, latents: Tensor, time: float) -> Tensor:
        """Predict at one time in [0, 1]: noisy latents [B, C, ...] -> fp32 [B, C, ...]."""
        null_part = self.null_part and self.null_part.at(time)
        return self.run(latents, [batch.at(time) for batch in self.batches], null_part)[0]

    def run(
        self, latents: Tensor, conditions: Sequence[Condition], null_part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict under given conditions.

        Args:
            latents: noisy latents [B, C, ...].
            conditions: `batches` with times.
            null_part: part of the network for the branch without the prompt; None = that of all times.

        Returns:
            The prediction with guidance and that of the prompts alone, fp32 [B, C, ...] each.
        """
        parts = zip(latents.chunk(len(conditions)), conditions, strict=True)
        null_part = null_part or self.null_part
        results = [self._run_batch(part, condition, null_part) for part, condition in parts]
        guided, with_text = zip(*results, strict=True)
        return torch.cat(guided), torch.cat(with_text)

    def _run_batch(
        self, latents: Tensor, condition: Condition, null_part: Part | None
    ) -> tuple[Tensor, Tensor]:
        if self.parts_differ:
            half = len(condition.timesteps) // 2
            prompts, nulls = condition.rows(slice(half)), condition.rows(slice(half, None))
            # One after another: no batch runs through two parts.
            branches = [self.predict(latents, prompts), self.predict(latents, replace(nulls, part=null_part))]
            prediction = torch.cat(branches).float()
        else:
            prediction = self.predict(latents, condition).float()

        if self.branches == 1:
            return prediction, prediction
        with_text, without = prediction.chunk(2)
        return without + self.guidance * (with_text - without), with_text

    @functools.cached_property
    def unguided(self) -> "Guided":
        """The same prompts without guidance."""
        return Guided(self.predict, self._condition, self._condition, 1.0)
