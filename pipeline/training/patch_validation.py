"""Validation of patch times and of the difficulty head: the loss as trained, and how well the head ranks the
patches of an image."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.diffusion.difficulty import (
    difficulty_loss,
    patch_errors,
    patch_log_variances,
    rank_correlation,
)
from pipeline.training.callbacks import Callback
from pipeline.training.validation import FIXED_TIMESTEPS, mean_over_ranks

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class PatchValidation(Callback):
    """Logs `patches/...` of the averaged weights on held-out batches every `log.validate_every_samples`.

    | name | |
    |---|---|
    | `loss` | loss at times as in training, which differ from patch to patch with `objective.patch_times` |
    | `difficulty` | loss of the difficulty head at these times |
    | `rank_correlation_t...` | at one time of all patches: Spearman's correlation of expected and true errors
    of an image's patches, mean over images; an adaptive solver can gain something only where it is well above
    0 |
    """

    def between_steps(self, trainer: "Trainer") -> None:
        """Validate if it is due."""
        if trainer.due(trainer.stage.log.validate_every_samples):
            trainer.heartbeat.enter("validate", trainer.state.step)
            values = self.validate(trainer)
            trainer.log.scores("patches", trainer.state.step, trainer.state.samples, values)

    @torch.no_grad()
    def validate(self, trainer: "Trainer") -> dict[str, float]:
        """Return the means over the held-out samples of all ranks, by name. Collective."""
        names = ["loss", "difficulty", *(f"rank_correlation_t{fixed:.4f}" for fixed in FIXED_TIMESTEPS)]
        # Sums and counts over this rank's images, in fp64 on the host.
        table = torch.zeros(2, len(names), dtype=torch.float64)
        with trainer.engine.averaged():
            for held_out in trainer.data.validation():
                batch = held_out.to(trainer.engine.device)
                quantities = [*self._losses(trainer, batch), *self._correlations(trainer, batch)]
                for column, numbers in enumerate(quantities):
                    # Of equal errors or expectations there is no correlation.
                    defined = numbers[~numbers.isnan()].double().cpu()
                    table[:, column] += torch.tensor([defined.sum(), len(defined)], dtype=torch.float64)

        sums, counts = mean_over_ranks(table)
        return {
            name: float(total / count)
            for name, total, count in zip(names, sums, counts, strict=True)
            if count
        }

    def _losses(self, trainer: "Trainer", batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the losses of the samples and those of the head, NaN without a head: fp32 [B] each."""
        objective, engine = trainer.objective, trainer.engine
        clean = trainer.inputs.clean_latents(batch)
        example = objective.training_example(clean, batch.noise, batch.u, batch.normal)
        condition = trainer.inputs.condition(batch, example.timesteps, example.levels)
        condition.with_difficulty = objective.config.difficulty > 0

        output = engine(example.noisy.to(engine.dtype), condition).float()
        prediction, log_variance = output[:, : clean.shape[1]], output[:, clean.shape[1] :]
        losses = objective.loss(prediction, example.target)
        if not condition.with_difficulty:
            return losses, torch.full_like(losses, math.nan)
        return losses, difficulty_loss(prediction, log_variance, example.target, objective.patch)

    def _correlations(self, trainer: "Trainer", batch: Batch) -> list[Tensor]:
        """Return the correlation of each image's patches at each of the fixed timesteps, fp32 [B] each."""
        objective, engine = trainer.objective, trainer.engine
        if not objective.config.difficulty:
            return []
        clean = trainer.inputs.clean_latents(batch)
        condition = replace(trainer.inputs.condition(batch, batch.u), with_difficulty=True)

        found = []
        for fixed in FIXED_TIMESTEPS:
            times = torch.full_like(batch.u, fixed)
            noisy, target = objective.add_noise(clean, batch.noise, times)
            output = engine(noisy.to(engine.dtype), replace(condition, timesteps=times)).float()
            errors = patch_errors(output[:, :-1], target, objective.patch)
            expected = patch_log_variances(output[:, -1:], objective.patch)
            pairs = zip(expected.cpu(), errors.cpu(), strict=True)
            found.append(torch.tensor([rank_correlation(one, other) for one, other in pairs]))
        return found
