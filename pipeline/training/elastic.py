"""Training of an elastic network: the part of it that each step trains, and the passes of that step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import DiTConfig
from model.elastic.config import ElasticConfig
from model.sub_network import SubNetwork
from pipeline.data.batch import Batch
from pipeline.data.epoch_plan import batch_numbers
from pipeline.diffusion.objective import Objective, make_objective
from pipeline.stage.config import StageConfig
from pipeline.training.inputs import NetworkInputs
from pipeline.training.passes import AddLosses, Passes

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine

_BISECTIONS = 60
"""Halvings of [0, 1], after which the ends of a search are neighbors in double precision."""


def uniform_bound(objective: Objective, time: float) -> float:
    """Return the share of training times below a time: where uniform numbers become times from it on.

    Args:
        objective: whose times rise with the uniform numbers.
        time: in (0, 1).
    """
    low, high = 0.0, 1.0

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = objective.sample_timesteps(torch.tensor([middle])).item() < time
        low, high = (middle, high) if below else (low, middle)
    return high


class PartChoice:
    """Chooses the part that a step trains: from (seed, epoch, number of the batch), so alike on all ranks and
    after a resume."""

    def __init__(self, config: ElasticConfig, sizes: DiTConfig, objective: Objective, seed: int) -> None:
        """Keep the parts.

        Args:
            config: the stage's settings.
            sizes: of the full network.
            objective: gives the density of times.
            seed: of the run.
        """
        self.config, self.sizes, self.seed = config, sizes, seed
        self.objective = objective
        self.depths = config.depths or [sizes.depth]
        self.whole, *self.others = config.parts(sizes)
        self._bounds: dict[int, list[float]] = {}
        """By the positions of the latents."""

    def bounds(self, positions: int) -> list[float]:
        """Return the uniform numbers at which each size's segment begins, and 1; empty without segments.

        Args:
            positions: of the latents, on which the density of times may depend.
        """
        if not self.config.segments:
            return []
        if positions not in self._bounds:
            objective = self.objective
            own = make_objective(objective.config.at_size(positions), objective.patch)
            inner = [uniform_bound(own, time) for time in self.config.segments]
            self._bounds[positions] = [0.0, *inner, 1.0]
        return self._bounds[positions]

    def parts(self, epoch: int, index: int, positions: int) -> list[SubNetwork]:
        """Return what a step trains: a part, or with `elastic.sandwich` the full network and then a part.

        With segments, the size of patches is chosen as often as times are in its segment, which leaves the
        density of times as it is; the full network then is that of all blocks.

        Args:
            epoch: of the batch.
            index: its number in the epoch.
            positions: of its latents.
        """
        first, second, third = batch_numbers(self.seed, epoch, "elastic", index // self.config.hold, 3)
        whole, others = self.whole, self.others
        if bounds := self.bounds(positions):
            patch = self.config.patches[sum(bound <= third for bound in bounds[1:-1])]
            whole = SubNetwork(self.sizes.depth, patch)
            others = [SubNetwork(depth, patch) for depth in self.depths[1:]]

        part = others[int(second * len(others))] if others else whole
        if self.config.sandwich:
            return [whole, part]

        return [whole if first < self.config.full else part]

    def shares(self, positions: int) -> dict[SubNetwork, float]:
        """Return how many passes of each part a step has on average, with latents of so many positions; with
        a sandwich they sum up to 2."""
        groups = [(1.0, self.whole, self.others)]
        if bounds := self.bounds(positions):
            groups = []
            for (low, high), patch in zip(pairwise(bounds), self.config.patches, strict=True):
                others = [SubNetwork(depth, patch) for depth in self.depths[1:]]
                groups.append((high - low, SubNetwork(self.sizes.depth, patch), others))

        shares = {}

        for mass, whole, others in groups:
            of_whole = 1.0 if self.config.sandwich or not others else self.config.full
            of_others = 1.0 if self.config.sandwich else 1.0 - of_whole
            shares[whole] = mass * of_whole
            for part in others:
                shares[part] = mass * of_others / len(others)
        return shares

    def uniform(self, u: Tensor, patch: int, positions: int) -> Tensor:
        """Move uniform numbers [B] into the segment of a size of patches, for latents of so many positions;
        without segments, keep them."""
        bounds = self.bounds(positions)
        if not bounds:
            return u
        number = self.config.patches.index(patch)
        low, high = bounds[number], bounds[number + 1]

        # In double precision, and never 1, at which the normal density's inverse is infinite.
        moved = (low + u.double() * (high - low)).float()
        return moved.clamp(max=1 - 2**-24)


class ElasticPasses(Passes):
    """Passes of the parts that each step chooses."""

    def __init__(self, stage: StageConfig, sizes: DiTConfig, engine: "Engine", inputs: NetworkInputs) -> None:
        """Keep what the passes need, as `Passes` does."""
        super().__init__(stage, sizes, engine, inputs)
        self.choice = PartChoice(stage.elastic, sizes, self.objective, stage.data.seed)
        self.objectives = {
            own.patch: make_objective(stage.objective, own.patch_shape) for own in self.all_sizes()
        }

    def all_sizes(self) -> list[DiTConfig]:
        """Return the sizes of the network, once for each size of patches."""
        return [self.sizes.with_patch(patch) for patch in self.stage.elastic.patches or [self.sizes.patch]]

    def quantities(self, buckets: Sequence[str]) -> list[str]:
        """Return the names of the losses of all parts, and of theirs in each bucket."""
        names = []

        for part in self.stage.elastic.parts(self.sizes):
            names += [f"loss_{part}", *(f"{bucket}_{part}" for bucket in buckets)]
        return names

    def part(self, batch: Batch) -> str:
        """Return the name of the part that a batch trains, in a sandwich of the second one."""
        return str(self.parts(batch)[-1])

    def parts(self, batch: Batch) -> list[SubNetwork]:
        """Return the parts that a batch trains, in order."""
        return self.choice.parts(batch.epoch, batch.index, _positions(batch))

    def run(self, batch: Batch, add_losses: AddLosses) -> None:
        """Leave the gradients of a batch in the engine."""
        parts = self.parts(batch)
        clean = self.inputs.clean_latents(batch)
        u = self.choice.uniform(batch.u, parts[0].patch, _positions(batch))
        example = self.objective.training_example(clean, batch.noise, u, batch.normal)
        condition = self.inputs.condition(batch, example.timesteps, example.levels)
        condition = replace(condition, with_difficulty=self.stage.objective.difficulty > 0)
        times = self.times(example)

        # The full network comes first: a part may learn from its prediction.
        for micro in self.inputs.micro_batches(batch, list(self.engine.micro_batches(len(clean)))):
            noisy = example.noisy[micro.rows].to(self.engine.dtype)
            target = example.target[micro.rows]
            given = micro.condition(condition)

            whole: Tensor | None = None
            for part in parts:
                prediction = self.engine(noisy, replace(given, part=part)).float()
                learned, losses = self.objectives[part.patch].training_losses(prediction, target)
                if whole is not None and self.stage.elastic.distil:
                    learned = self._distilled(learned, losses, prediction, whole)

                weight = 1.0 if whole is None else self.stage.elastic.part_weight
                self.engine.backward(weight * learned.mean())
                add_losses(batch, losses.detach(), times[micro.rows], str(part))
                whole = prediction.detach()[:, : target.shape[1]]

    def _distilled(self, learned: Tensor, losses: Tensor, prediction: Tensor, whole: Tensor) -> Tensor:
        """Return the losses [B] of a part with their share that compares it with the full network."""
        share = self.stage.elastic.distil
        from_whole = self.objective.loss(prediction[:, : whole.shape[1]], whole)
        # `learned` may hold the loss of the difficulty head besides, which stays as it is.
        return learned + share * (from_whole - losses)


def _positions(batch: Batch) -> int:
    """Return the positions of a sample's latents."""
    return math.prod(batch.mean.shape[2:])
