"""Position of a patch in a clip: the image network's convolutions on each frame, and layers over frames that
start at zero.

So an image network's weights start a network of clips that equals it bit for bit on one frame, and on every
frame of a clip as far as frames do not attend to one another.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DiTConfig
from model.costs import LayerCost, gains
from model.functional import timestep_features
from model.layers import PositionBlock, ZeroLinear
from model.rotary import NoPosition

TAPS = 3
"""Frames that a channel of the convolution over frames reads: the one before, its own, the one after."""


class TemporalConvolution(nn.Module):
    """Depth-wise convolution over frames, without a bias; it starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the starting values."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, T, h, w, C] along T; beyond the ends there are zeros."""
        before, own, after = self.weight
        # Three products are faster than a grouped convolution, of which the CPU has no fast one.
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))  # [B, T + 2, h, w, C]
        return before * padded[:, :-2] + own * x + after * padded[:, 2:]


class VideoPositionBlock(PositionBlock):
    """The position block of clips.

    By the convolution over frames a patch sees its past and its future. That alone marks only the first and
    the last frame, by the zeros beyond them, so each frame also gets an embedding of its number.
    """

    def __init__(self, width: int, frequency_width: int) -> None:
        """Build the block.

        Args:
            width: channels of a patch.
            frequency_width: width of the sinusoids of a frame's number.
        """
        super().__init__(width)
        self.frequency_width = frequency_width
        self.temporal = TemporalConvolution(width // 4)
        self.frame_embedding = ZeroLinear(frequency_width, width)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Add the contribution of neighbors and frames to patches x [B, N, D], which fill a grid of (frames,
        rows, columns)."""
        frames, rows, columns = grid
        clip = len(x), frames

        # each frame by itself, as in an image
        h = F.silu(self.input_norm(x)).unflatten(1, (frames, rows, columns)).flatten(0, 1)  # [B T, h, w, D]
        h = self.narrow(h.movedim(-1, 1)).movedim(1, -1)  # [B T, h, w, D / 4]
        h = F.silu(self.inner_norm(h))

        # frames with one another
        h = h + self.temporal(h.unflatten(0, clip)).flatten(0, 1)

        h = self.widen(h.movedim(-1, 1)).flatten(2).transpose(1, 2)  # [B T, h w, D]
        x = x + h.unflatten(0, clip).flatten(1, 2)  # [B, N, D]
        return x + self.embed_frames(frames).repeat_interleave(rows * columns, dim=0)

    def embed_frames(self, frames: int) -> Tensor:
        """Return the embedding [T, D] of each frame's number, from 0."""
        weight = self.frame_embedding.weight
        numbers = torch.arange(frames, device=weight.device)
        # The sinusoids of a timestep have a thousandth as their unit, those of a frame have a frame.
        features = timestep_features(numbers / 1000, self.frequency_width)  # fp32 [T, F]
        return self.frame_embedding(features.to(weight.dtype))


def make_position(sizes: DiTConfig) -> PositionBlock | NoPosition:
    """Build the position block of a network of images or of clips; with `rope` there is none."""
    if sizes.position == "rope":
        return NoPosition()
    if sizes.axes == 2:
        return PositionBlock(sizes.width)
    return VideoPositionBlock(sizes.width, sizes.frequency_width)


def position_costs(sizes: DiTConfig, patches: int) -> Iterator[LayerCost]:
    """Yield the costs of the position block."""
    width, narrow = sizes.width, sizes.width // 4
    if sizes.position == "rope":
        return
    yield gains(width, narrow)
    yield LayerCost(9 * width * narrow, narrow, patches)
    yield LayerCost(9 * narrow * width, width, patches)
    if sizes.axes == 2:
        return

    # what clips add
    yield LayerCost(TAPS * (sizes.width // 4), 0, patches)
    # Frames are few beside their patches: their embedding costs next to nothing.
    yield LayerCost(0, (sizes.frequency_width + 1) * sizes.width, 0)
