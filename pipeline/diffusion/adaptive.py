"""Solvers that follow the difficulty of patches (Patch Forcing, arXiv 2604.19141).

Each step of Euler's method first asks the network how large an error it expects of each patch. The easy
patches, those of an image whose expected error is below a quantile, go ahead, and the hard ones are evaluated
with the easy ones as context. Every evaluation computes all patches: the work is not less, it is spent at
other times. With guidance, log-variances are combined by the same formula as velocities.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.common.registry import Registry
from model.condition import Condition
from model.functional import fill_patches
from pipeline.diffusion.difficulty import patch_log_variances
from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.patch_times import make_levels
from pipeline.stage.objective import ObjectiveConfig
from pipeline.stage.sampling import AdaptiveConfig


@dataclass
class PatchPrediction:
    """One evaluation of the network."""

    velocity: Tensor
    """With guidance, fp32 [B, C, ...]."""
    of_prompt: Tensor
    """Without guidance."""
    log_variance: Tensor
    """fp32 [B, N], with guidance."""


class AdaptiveSolver(ABC):
    """Takes the steps of an Euler scheduler in another way."""

    def __init__(
        self, euler: Any, objective: ObjectiveConfig, settings: AdaptiveConfig, patch: Sequence[int]
    ) -> None:
        """Keep what a step needs.

        Args:
            euler: diffusers' Euler scheduler, which gives the times.
            objective: settings of training.
            settings: settings of the solver.
            patch: latent positions of a patch along each axis.
        """
        self.euler, self.objective, self.settings, self.patch = euler, objective, settings, patch

    @abstractmethod
    def advance(self, evaluate: Guided, latents: Tensor, timestep: Tensor) -> Tensor:
        """Take the step of the scheduler's `timestep`: fp32 latents [B, C, ...] -> the same at its end."""

    @abstractmethod
    def evaluations(self, times: Sequence[float], branches: int) -> int:
        """Return how often an image's steps at these times evaluate the network, each branch of guidance
        counted."""

    def interval(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times between which a step goes, fp32 [] each."""
        index = self.euler.index_for_timestep(timestep)
        return self.euler.sigmas[index], self.euler.sigmas[index + 1]

    def predict(self, evaluate: Guided, latents: Tensor, time: Tensor) -> PatchPrediction:
        """Evaluate all patches at one time."""
        return self._predict(evaluate, latents, [batch.at(time.item()) for batch in evaluate.batches])

    def predict_mixed(
        self, evaluate: Guided, latents: Tensor, times: tuple[Tensor, Tensor], hard: Tensor
    ) -> PatchPrediction:
        """Evaluate easy patches at the first time, and those where `hard` [B, N] is True at the second."""
        parts = zip(evaluate.batches, hard.long().chunk(len(evaluate.batches)), strict=True)
        first, second = (time.item() for time in times)
        at = functools.partial(self._at_two_times, first=first, second=second)
        return self._predict(evaluate, latents, [at(batch, places) for batch, places in parts])

    def _at_two_times(self, batch: Condition, places: Tensor, first: float, second: float) -> Condition:
        # Where all patches of a batch have one time, the network runs as in Euler's method, bit for bit.
        if first == second or not places.any():
            return batch.at(first)
        if places.all():
            return batch.at(second)
        # The branches of guidance follow one another in a batch.
        places = places.repeat(len(batch.timesteps) // len(places), 1)
        times = torch.tensor([[first, second]], device=places.device).repeat(len(places), 1)
        levels = make_levels(self.objective.patch_times, times, places)
        return replace(batch, timesteps=times, levels=levels)

    def _predict(self, evaluate: Guided, latents: Tensor, conditions: Sequence[Condition]) -> PatchPrediction:
        asked = [replace(condition, with_difficulty=True) for condition in conditions]
        guided, of_prompt = evaluate.run(latents, asked)
        log_variance = patch_log_variances(guided[:, -1:], self.patch)
        return PatchPrediction(guided[:, :-1], of_prompt[:, :-1], log_variance)

    def find_easy(self, log_variance: Tensor) -> Tensor:
        """Return which patches are easy, bool [B, N]: those strictly below the quantile of their image."""
        if self.settings.easy == 1.0:
            return torch.ones_like(log_variance, dtype=torch.bool)
        return log_variance < log_variance.quantile(self.settings.easy, dim=1, keepdim=True)

    def choose(self, mask: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
        """Return the positions of `chosen` in the patches where `mask` [B, N] is True, and elsewhere
        `others`."""
        return torch.where(fill_patches(mask, self.patch, chosen.shape[2:]), chosen, others)


ADAPTIVE: Registry[type[AdaptiveSolver]] = Registry("scheduler")
"""Solvers by name."""


@ADAPTIVE.register("dual_loop")
class DualLoop(AdaptiveSolver):
    """Easy patches take the whole step at once, hard ones in `inner` steps that see the easy ones at its
    end."""

    @property
    def inner(self) -> int:
        """Evaluations of a step."""
        return 1 if self.settings.easy == 1.0 else self.settings.inner

    def advance(self, evaluate: Guided, latents: Tensor, timestep: Tensor) -> Tensor:
        """Take a step."""
        start, end = self.interval(timestep)
        times = [start + (end - start) * (step / self.inner) for step in range(self.inner)] + [end]

        predicted = self.predict(evaluate, latents, start)
        easy = self.find_easy(predicted.log_variance)
        whole, part = (latents + (then - start) * predicted.velocity for then in (end, times[1]))
        latents = self.choose(easy, whole, part)

        for now, then in pairwise(times[1:]):
            velocity = self.predict_mixed(evaluate, latents, (end, now), ~easy).velocity
            latents = self.choose(easy, latents, latents + (then - now) * velocity)
        return latents

    def evaluations(self, times: Sequence[float], branches: int) -> int:
        """Return the number of evaluations."""
        return len(times) * self.inner * branches


@ADAPTIVE.register("look_ahead")
class LookAhead(AdaptiveSolver):
    """Hard patches are evaluated a second time, beside easy ones that have jumped ahead; then all take the
    step.

    The latents stay at one time. Near pure noise there is no guidance.
    """

    def advance(self, evaluate: Guided, latents: Tensor, timestep: Tensor) -> Tensor:
        """Take a step."""
        start, end = self.interval(timestep)
        if self._is_unguided(start.item()):
            evaluate = evaluate.unguided

        first = self.predict(evaluate, latents, start)
        easy = self.find_easy(first.log_variance)
        # `start` itself for ratio 1, so that nothing is rounded.
        ahead = (start - (self.settings.ratio - 1.0) * (1.0 - start)).clamp(min=0.0)
        # The jump follows the prompt without guidance, whose velocity is too large for a long step.
        context = self.choose(easy, latents + (ahead - start) * first.of_prompt, latents)
        second = self.predict_mixed(evaluate, context, (ahead, start), ~easy)
        return latents + (end - start) * self.choose(easy, first.velocity, second.velocity)

    def evaluations(self, times: Sequence[float], branches: int) -> int:
        """Return the number of evaluations."""
        return sum(2 * (1 if self._is_unguided(time) else branches) for time in times)

    def _is_unguided(self, time: float) -> bool:
        return time >= self.settings.unguided
