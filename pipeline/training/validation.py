"""Losses at fixed timesteps on fixed batches: the numbers that show whether, and what, a network has
learned."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from model.condition import Condition, Predict, Text
from model.sub_network import Part
from pipeline.diffusion.objective import Objective
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer

FIXED_TIMESTEPS = [(index + 0.5) / 8 for index in range(8)]
"""Eight timesteps spread evenly over (0, 1), as in Stable Diffusion 3's validation loss."""


def with_shifted_captions(condition: Condition) -> Condition:
    """Give each sample the caption of its neighbor in the batch."""

    def shifted(text: Text) -> Text:
        # The mask moves along, since captions have different lengths. A roll, because it leaves no sample its
        # own.
        return replace(text, states=text.states.roll(1, 0), mask=text.mask.roll(1, 0))

    return replace(condition, texts=[shifted(text) for text in condition.texts])


@torch.no_grad()
def losses_at_fixed_timesteps(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor, Condition]],
    objective: Objective,
    dtype: torch.dtype,
    shuffle_captions: bool = False,
) -> Tensor:
    """Return the mean loss at each of `FIXED_TIMESTEPS` over this rank's batches, fp64 [8].

    Args:
        predict: the network.
        batches: (clean latents, noise, condition) of each batch; the condition's timesteps are not read.
        objective: what the network was trained to predict.
        dtype: precision of the latents that the network gets.
        shuffle_captions: give each sample another sample's caption; a network that uses its text does worse
        then.
    """
    sums = torch.zeros(len(FIXED_TIMESTEPS), dtype=torch.float64)
    count = 0
    for clean, noise, condition in batches:
        given = with_shifted_captions(condition) if shuffle_captions else condition
        # All timesteps of a batch with the same noise: the curves differ only by timestep.
        for index, fixed in enumerate(FIXED_TIMESTEPS):
            timesteps = torch.full((len(clean),), fixed, device=clean.device)
            noisy, target = objective.add_noise(clean, noise, timesteps)
            prediction = predict(noisy.to(dtype), given.at(fixed))
            # Summed in fp64 on the host, so that the number of batches does not limit the precision.
            sums[index] += objective.loss(prediction.float(), target).double().sum().cpu()
        count += len(clean)
    return sums / max(count, 1)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a CPU tensor over all ranks, which see equally many samples."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL has no collectives for CPU tensors.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values)
        return values.cpu() / dist.get_world_size()
    return values


def held_out_losses(trainer: "Trainer", part: Part | None) -> Tensor:
    """Return the mean loss of a part of the network at each of `FIXED_TIMESTEPS` over all ranks' held-out
    batches, fp64 [8]; collective."""
    engine, inputs = trainer.engine, trainer.inputs
    # Lazy, so that only one batch is in memory at a time.
    moved = (batch.to(engine.device) for batch in trainer.data.validation())
    held_out = (
        (inputs.clean_latents(batch), batch.noise, replace(inputs.condition(batch, batch.u), part=part))
        for batch in moved
    )
    return mean_over_ranks(losses_at_fixed_timesteps(engine, held_out, trainer.objective, engine.dtype))


class Validation(Callback):
    """Logs the loss of the averaged weights on held-out batches every `log.validate_every_samples`
    samples."""

    def between_steps(self, trainer: "Trainer") -> None:
        """Validate if it is due."""
        if trainer.due(trainer.stage.log.validate_every_samples):
            trainer.heartbeat.enter("validate", trainer.state.step)
            self.validate(trainer)

    def validate(self, trainer: "Trainer") -> float:
        """Measure the losses on all ranks, log their mean, and return it."""
        # The averaged weights, because these are the ones that are sampled and exported.
        with trainer.engine.averaged():
            losses = held_out_losses(trainer, trainer.inputs.part)

        by_timestep = zip(FIXED_TIMESTEPS, losses, strict=True)
        values = {f"validation_t{fixed:.4f}": float(loss) for fixed, loss in by_timestep}
        loss = float(losses.mean())
        trainer.log_event("validation", loss=loss, **values)
        return loss
