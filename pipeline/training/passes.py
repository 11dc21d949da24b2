"""The forward and backward passes of a training step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from model.condition import Condition
from model.config import DiTConfig
from pipeline.data.batch import Batch
from pipeline.diffusion.objective import TrainingExample, make_objective
from pipeline.stage.config import StageConfig
from pipeline.training.inputs import NetworkInputs

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine

AddLosses = Callable[[Batch, Tensor, Tensor, str], None]
"""Takes a batch, the losses fp32 [B] of one of its micro-batches, their timesteps [B] or [B, N], and the name
of the part of the network that has them; empty = the whole network."""


class Passes:
    """Runs the network forward and backward on each micro-batch of a batch."""

    def __init__(self, stage: StageConfig, sizes: DiTConfig, engine: "Engine", inputs: NetworkInputs) -> None:
        """Keep what the passes need.

        Args:
            stage: the resolved stage.
            sizes: of the network.
            engine: runs the network.
            inputs: turns batches into what the network reads.

        Raises:
            UserError: if the engine's device has no kernel for the network's attention.
        """
        sizes.attention.check_device(engine.device.type)
        self.stage, self.sizes = stage, sizes
        self.engine, self.inputs = engine, inputs
        self.objective = make_objective(stage.objective, sizes.patch_shape)
        self.terms: list[Callable[[Condition], Tensor]] = []
        """Further terms [] of the loss of a micro-batch, after its forward pass."""

    def quantities(self, buckets: Sequence[str]) -> list[str]:
        """Return the names of further losses that the trainer sums up: those of the network's parts.

        Args:
            buckets: names of the losses of all buckets.
        """
        return []

    def all_sizes(self) -> list[DiTConfig]:
        """Return the sizes of the network, once for each size of patches that it computes with."""
        return [self.sizes]

    def grids(self, positions: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the grid of patches of latents of `positions` = (h, w) or (T, h, w), for each size of
        patches; if the blocks do not read the grid, the number of patches.

        Raises:
            UserError: if the latents do not divide into patches of a size.
        """
        grids = [sizes.patch_grid(positions) for sizes in self.all_sizes()]
        return grids if self.sizes.needs_grid else [(math.prod(grid),) for grid in grids]

    def times(self, example: TrainingExample) -> Tensor:
        """Return the times by which losses are sorted, fp32 [B] or [B, K]."""
        if self.stage.objective.first_frame and example.levels is not None:
            # The time of a given frame is no measure of the sample's noise.
            return example.levels.sample_times
        return example.timesteps

    def part(self, batch: Batch) -> str:
        """Return the name of what a batch trains, by which metrics are sorted; empty = the whole network."""
        return ""

    def run(self, batch: Batch, add_losses: AddLosses) -> None:
        """Leave the gradients of a batch in the engine."""
        clean = self.inputs.clean_latents(batch)
        example = self.objective.training_example(clean, batch.noise, batch.u, batch.normal)
        condition = self.inputs.condition(batch, example.timesteps, example.levels)
        condition = replace(condition, with_difficulty=self.stage.objective.difficulty > 0)

        times = self.times(example)
        parts = list(self.engine.micro_batches(len(clean)))
        for part in self.inputs.micro_batches(batch, parts):
            noisy = example.noisy[part.rows].to(self.engine.dtype)

            given = part.condition(condition)
            prediction = self.engine(noisy, given)
            learned, losses = self.objective.training_losses(prediction.float(), example.target[part.rows])
            loss = learned.mean()
            for term in self.terms:
                loss = loss + term(given)
            self.engine.backward(loss)
            add_losses(batch, losses.detach(), times[part.rows], "")
