"""Losses at fixed timesteps on fixed batches: the number that says whether, and what, a network has learned."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from model.fusion import Text
from pipeline.diffusion.objective import corrupt_at, loss_per_sample
from pipeline.stage.config import ObjectiveConfig

FIXED_TIMESTEPS = [(index + 0.5) / 8 for index in range(8)]
"""Eight timesteps spread evenly over (0, 1), as in Stable Diffusion 3's validation loss."""

Predict = Callable[[Tensor, Tensor, Sequence[Text]], Tensor]
"""(noisy latents [B, C, h, w], timesteps [B], texts) -> prediction [B, C, h, w]."""


def rolled(text: Text) -> Text:
    """Each sample gets its neighbour's caption."""
    return replace(text, states=text.states.roll(1, 0), mask=text.mask.roll(1, 0))


@torch.no_grad()
def losses_at_fixed_timesteps(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor, list[Text]]],
    objective: ObjectiveConfig,
    dtype: torch.dtype,
    shuffle_captions: bool = False,
) -> Tensor:
    """Mean loss at each of `FIXED_TIMESTEPS`, fp64 [8], over this rank's batches of (clean, noise, texts).

    With `shuffle_captions` each sample is given another sample's caption: a network that uses its text does worse then.
    """
    sums = torch.zeros(len(FIXED_TIMESTEPS), dtype=torch.float64)
    count = 0
    for clean, noise, texts in batches:
        given = [rolled(text) for text in texts] if shuffle_captions else texts
        for index, fixed in enumerate(FIXED_TIMESTEPS):
            timesteps = torch.full((len(clean),), fixed, device=clean.device)
            noisy, target = corrupt_at(objective, clean, noise, timesteps)
            losses = loss_per_sample(predict(noisy.to(dtype), timesteps, given).float(), target)
            sums[index] += losses.double().sum().cpu()
        count += len(clean)
    return sums / max(count, 1)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a CPU tensor over all ranks that see equally many samples."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = values.to(device)
        dist.all_reduce(values)
        return values.cpu() / dist.get_world_size()
    return values
