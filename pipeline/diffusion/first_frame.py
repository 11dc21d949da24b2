"""Clips whose first frame is given: an image that moves (the token replacement of HunyuanVideo's
image-to-video model, arXiv 2412.03603).

The patches of the first frame are clean, and at time 0; all others are at the sample's time. A sample has two
times then, which are its levels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.condition import Condition, Levels, Predict
from model.config import DiTConfig

FIRST_LEVEL, OTHER_LEVEL = 0, 1
LEVELS = 2


def first_frame_levels(given: Tensor, times: Tensor, grid: Sequence[int]) -> tuple[Tensor, Levels]:
    """Return the times of two levels, and the level of each patch.

    Args:
        given: bool [B]: True = the sample's first frame is given.
        times: fp32 [B] of the other frames.
        grid: patches of the latents along each axis, (frames, rows, columns).

    Returns:
        Times fp32 [B, 2], 0 and the sample's; and the levels, of which the text side reads the sample's.
    """
    frames, rows, columns = grid
    is_first = torch.arange(frames, device=times.device) == 0
    first = (given[:, None] & is_first).repeat_interleave(rows * columns, dim=1)  # [B, N]
    places = torch.where(first, FIRST_LEVEL, OTHER_LEVEL)
    return torch.stack([torch.zeros_like(times), times], dim=1), Levels(places, times)


class GivenFirstFrame:
    """The network as a function whose samples keep a given first frame."""

    def __init__(self, predict: Predict, sizes: DiTConfig, frame: Tensor) -> None:
        """Keep what each call needs.

        Args:
            predict: the network.
            sizes: of the network.
            frame: normalized latents of the first frame [B or 1, C, 1, h, w].
        """
        self.predict, self.sizes, self.frame = predict, sizes, frame

    def __call__(self, latents: Tensor, condition: Condition) -> Tensor:
        """Predict for latents [B, C, T, h, w], whose first frame is replaced by the given one; it does not
        move."""
        latents = self.with_frame(latents)
        grid = self.sizes.patch_grid(latents.shape[2:])
        given = torch.ones(len(condition.timesteps), dtype=torch.bool, device=latents.device)
        times, levels = first_frame_levels(given, condition.timesteps, grid)

        prediction = self.predict(latents, replace(condition, timesteps=times, levels=levels))
        prediction[:, :, :1] = 0
        return prediction

    def with_frame(self, latents: Tensor) -> Tensor:
        """Return latents with the given first frame."""
        first = self.frame.to(latents).expand(len(latents), -1, -1, -1, -1)
        return torch.cat([first, latents[:, :, 1:]], dim=2)
