"""Validation of patch times and of the difficulty head: the loss as trained, and how well the head ranks the
patches of an image."""

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
from pipeline.diffusion.objective import TrainingExample
from pipeline.training.callbacks import Callback
from pipeline.training.metrics import TIMESTEP_BINS, bins_of
from pipeline.training.validation import FIXED_TIMESTEPS, mean_over_ranks

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class PatchValidation(Callback):
    """Logs `patches/...` of the averaged weights on held-out batches every `log.validate_every_samples`.

    | name | |
    |---|---|
    | `loss` | loss at times as in training, which differ from patch to patch with `objective.patch_times` |
    | `loss_t<i>` | the same of the patches whose own time is in the i-th of equal parts of [0, 1] |
    | `difficulty` | loss of the difficulty head at these times |
    | `difficulty_t...` | the same at one time of all patches |
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
        names = [
            "loss",
            *(f"loss_t{index}" for index in range(TIMESTEP_BINS)),
            "difficulty",
            *(f"difficulty_t{fixed:.4f}" for fixed in FIXED_TIMESTEPS),
            *(f"rank_correlation_t{fixed:.4f}" for fixed in FIXED_TIMESTEPS),
        ]
        # Sums and counts over this rank's images or patches, in fp64 on the host.
        table = torch.zeros(2, len(names), dtype=torch.float64)
        with trainer.engine.averaged():
            for held_out in trainer.data.validation():
                batch = held_out.to(trainer.engine.device)
                found = self._at_times_of_training(trainer, batch) | self._at_fixed_times(trainer, batch)
                for name, numbers in found.items():
                    # Of equal errors or expectations there is no correlation.
                    defined = numbers[~numbers.isnan()].double().cpu()
                    table[:, names.index(name)] += torch.tensor(
                        [defined.sum(), len(defined)], dtype=torch.float64
                    )

        sums, counts = mean_over_ranks(table)
        return {
            name: float(total / count)
            for name, total, count in zip(names, sums, counts, strict=True)
            if count
        }

    def _at_times_of_training(self, trainer: "Trainer", batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the samples, of the patches by their time, and of the head."""
        objective, engine = trainer.objective, trainer.engine

        clean = trainer.inputs.clean_latents(batch)
        example = objective.training_example(clean, batch.noise, batch.u, batch.normal)
        condition = trainer.inputs.condition(batch, example.timesteps, example.levels)
        condition.with_difficulty = objective.config.difficulty > 0

        output = engine(example.noisy.to(engine.dtype), condition).float()
        prediction, log_variance = output[:, : clean.shape[1]], output[:, clean.shape[1] :]
        found = {"loss": objective.loss(prediction, example.target)}

        errors = patch_errors(prediction, example.target, objective.patch)
        bins = bins_of(_times_of_patches(example, errors))
        found |= {f"loss_t{index}": errors[bins == index] for index in range(TIMESTEP_BINS)}
        if condition.with_difficulty:
            found["difficulty"] = difficulty_loss(prediction, log_variance, example.target, objective.patch)
        return found

    def _at_fixed_times(self, trainer: "Trainer", batch: Batch) -> dict[str, Tensor]:
        """Return the head's loss of each sample, and how well it ranks its patches, by time."""
        objective, engine = trainer.objective, trainer.engine
        if not objective.config.difficulty:
            return {}

        clean = trainer.inputs.clean_latents(batch)
        condition = replace(trainer.inputs.condition(batch, batch.u), with_difficulty=True)

        found = {}
        for fixed in FIXED_TIMESTEPS:
            times = torch.full_like(batch.u, fixed)
            noisy, target = objective.add_noise(clean, batch.noise, times)
            output = engine(noisy.to(engine.dtype), replace(condition, timesteps=times)).float()
            prediction, log_variance = output[:, :-1], output[:, -1:]

            found[f"difficulty_t{fixed:.4f}"] = difficulty_loss(
                prediction, log_variance, target, objective.patch
            )
            errors = patch_errors(prediction, target, objective.patch)
            expected = patch_log_variances(log_variance, objective.patch)
            pairs = zip(expected.cpu(), errors.cpu(), strict=True)
            correlations = [rank_correlation(one, other) for one, other in pairs]
            found[f"rank_correlation_t{fixed:.4f}"] = torch.tensor(correlations)
        return found


def _times_of_patches(example: TrainingExample, errors: Tensor) -> Tensor:
    """Return the time of each patch, fp32 like the errors [B, N]."""
    if example.levels is not None:
        return example.timesteps.gather(1, example.levels.places)
    times = example.timesteps
    return times if times.dim() == 2 else times[:, None].expand_as(errors)
