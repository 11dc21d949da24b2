"""Rotary positions of patches in frames, rows and columns (RoPE, arXiv 2104.09864; axes as in HunyuanVideo,
arXiv 2412.03603)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

THETA = 256.0
"""Base of the frequencies; small, since a grid has at most a few hundred positions along an axis."""


def axis_widths(head: int) -> tuple[int, int, int]:
    """Return how many channels of a head turn with frame, row and column: an eighth with the frame and the
    rest alike with row and column, such as 16, 56 and 56 of 128."""
    time = head // 16 * 2
    side = (head - time) // 4 * 2
    return head - 2 * side, side, side


def rotation_table(
    grid: Sequence[int], head: int, device: torch.device | None = None, scale: int = 1
) -> Tensor:
    """Return cosines and sines of the angles of each patch.

    Args:
        grid: patches along each axis: (rows, columns), or (frames, rows, columns).
        head: channels of a head.
        device: of the result.
        scale: positions that a patch takes along rows and columns; its own is their mean.

    Returns:
        fp32 [2, N, head / 2]; an image has the angles of a clip's first frame.
    """
    sizes = (1,) * (3 - len(grid)) + tuple(grid)
    angles = []
    for axis, (size, width) in enumerate(zip(sizes, axis_widths(head), strict=True)):
        exponents = torch.arange(0, width, 2, device=device).float() / max(width, 1)
        places = torch.arange(size, device=device).float()
        if axis > 0:
            places = places * scale + (scale - 1) / 2
        own = places[:, None] * THETA**-exponents  # [size, width / 2]
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append(own.view(shape).expand(*sizes, -1))
    joined = torch.cat(angles, dim=-1).flatten(0, 2)  # [N, head / 2]
    return torch.stack([joined.cos(), joined.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn queries or keys x [B, N, H, d] by the angles of their patches; neighboring channels are a pair."""
    cos, sin = table[:, None, :, None].float()  # [1, N, 1, d / 2] each
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, H, d / 2] each
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class NoPosition(nn.Module):
    """In place of the position block of a network whose attention turns with the position."""

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the patches as they are."""
        return x
