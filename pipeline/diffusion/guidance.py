"""The network with classifier-free guidance (Ho and Salimans 2022), as solvers call it."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.condition import Condition, Predict, Users
from model.sub_network import Part


def has_own_scale(has_user: bool, guidance: float, user_guidance: float | None) -> bool:
    """Return True if there is a user whose scale differs from that of the text: a third branch."""
    return has_user and user_guidance not in (None, guidance)


def without_users(condition: Condition, like: Users | None = None) -> Condition:
    """Return the condition with nobody as user, in the form of `like`, or of its own users."""
    users = like or condition.users
    if users is None:
        return condition
    return replace(condition, users=Users(torch.full_like(users.ids, -1), users.tokens))


class Guided:
    """Evaluates the network, both branches of guidance in one batch.

    On the CPU each image is a batch of its own, unless `together`. There, two operations depend on the other
    images of a batch: matrix products of few rows (of the conditions, one row per image) and attention to
    padded texts; both sum in another order for other shapes. An image of hundreds of patches fills a product
    by itself; one of 16 takes four times as long alone as in a batch.
    """

    def __init__(
        self,
        predict: Predict,
        condition: Condition,
        null_condition: Condition,
        guidance: float,
        user_guidance: float | None = None,
        together: bool = False,
    ) -> None:
        """Put the branches into batches, once for all steps.

        Args:
            predict: the network.
            condition: texts and further conditions of the prompts; its timesteps are not read.
            null_condition: the same of the null or the negative captions; not read at guidance 1.
            guidance: 1 = none.
            user_guidance: scale of the user by itself: null + guidance (text - null) + user_guidance (text
                and user - text); None = that of the text, which takes no third branch.
            together: all images are one batch on the CPU too.
        """
        self.predict, self.guidance, self._condition = predict, guidance, condition
        self.together = together
        self.user_guidance: float | None = None
        if has_own_scale(condition.users is not None, guidance, user_guidance):
            self.user_guidance = user_guidance
        # Without guidance the second branch would only double the work.
        branches = [condition] if guidance == 1.0 else [condition, null_condition]
        if self.user_guidance is not None:
            branches.insert(1, without_users(condition))
        if condition.users is not None:
            branches[1:] = [without_users(branch, condition.users) for branch in branches[1:]]
        self.branches = len(branches)
        # An elastic network may evaluate the branches with parts of itself that differ.
        self.null_part = null_condition.part
        self.parts_differ = self.branches == 2 and condition.part != null_condition.part
        if condition.texts[0].states.device.type == "cpu" and not together:
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
        if self.user_guidance is not None:
            return self._with_user(*prediction.chunk(self.branches))
        with_text, without = prediction.chunk(2)
        return without + self.guidance * (with_text - without), with_text

    def _with_user(
        self, with_user: Tensor, with_text: Tensor, without: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Combine the branches where the user has a scale of its own."""
        assert self.user_guidance is not None
        # Of text guidance 1 there is no branch without text.
        base = with_text if without is None else without + self.guidance * (with_text - without)
        return base + self.user_guidance * (with_user - with_text), with_user

    @functools.cached_property
    def unguided(self) -> "Guided":
        """The same prompts without guidance."""
        return Guided(self.predict, self._condition, self._condition, 1.0, together=self.together)
