"""Self-attention of tiles of patches to few other tiles, with tiles shifted in every second block.

A tile is a square of neighboring patches. The patches of a tile attend to their own tile and to those tiles
whose mean keys fit the tile's mean query best, which each head chooses for itself. So the cost grows with the
patches times the kept ones. The choice has no gradient. After ElasticDiT (arXiv 2605.15684), whose selection
rule is not public; ours is that of published block-sparse attention.

On CUDA torch's FlexAttention reads the tiles in place; that path was never run on a GPU.

A shift by half a tile is a roll of the grid: tiles at the border then hold patches from opposite sides.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_config import AttentionConfig
from model.layers import SelfAttention
from model.region import allow_graphs

TILES_AT_ONCE = 8
"""Tiles whose keys and values are copied together where no gradient is needed: 16 MB at 2,624 keys of 96, the
fastest of 4 to 64 on a CPU."""


class Tiles(NamedTuple):
    """A grid of patches in tiles."""

    rows: int
    columns: int
    side: int
    """Patches along a side of a tile."""
    shift: int
    """Patches that tiles are shifted by along both axes."""

    @property
    def across(self) -> tuple[int, int]:
        """Number of tiles along rows and columns; the last ones may have places without a patch."""
        return math.ceil(self.rows / self.side), math.ceil(self.columns / self.side)

    @property
    def is_filled(self) -> bool:
        """True if every place of every tile has a patch."""
        return self.rows % self.side == 0 and self.columns % self.side == 0

    def cut(self, x: Tensor) -> Tensor:
        """Cut patches [B, N, H, d] into tiles [B, H, T, P, d]; places without a patch are zero."""
        (down, across), side = self.across, self.side

        x = x.unflatten(1, (self.rows, self.columns)).roll((-self.shift, -self.shift), (1, 2))
        x = F.pad(x, (0, 0, 0, 0, 0, across * side - self.columns, 0, down * side - self.rows))

        x = x.unflatten(2, (across, side)).unflatten(1, (down, side))  # [B, R, s, C, s, H, d]
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`: tiles [B, H, T, P, d] -> patches [B, N, H, d]."""
        (down, across), side = self.across, self.side
        x = x.unflatten(3, (side, side)).unflatten(2, (down, across)).permute(0, 2, 4, 3, 5, 1, 6)

        x = x.flatten(3, 4).flatten(1, 2)[:, : self.rows, : self.columns]
        return x.roll((self.shift, self.shift), (1, 2)).flatten(1, 2)

    def patches(self, device: torch.device) -> Tensor:
        """Return which places have a patch, bool [T, P]."""
        ones = torch.ones(1, self.rows * self.columns, 1, 1, device=device)
        return self.cut(ones)[0, 0, :, :, 0] > 0


def choose_tiles(q: Tensor, k: Tensor, filled: Tensor, count: int) -> Tensor:
    """Return the tiles that each tile attends to, int64 [B, H, T, count], rising; its own among them.

    Args:
        q: queries in tiles [B, H, T, P, d].
        k: keys in tiles.
        filled: which places have a patch, bool [T, P].
        count: number of tiles to choose.
    """
    # Means over the patches alone: places without a patch are zero.
    sizes = filled.sum(1)[:, None]

    with torch.no_grad():
        query, key = (x.float().sum(3) / sizes for x in (q, k))  # [B, H, T, d]
        scores = query @ key.transpose(-1, -2)  # [B, H, T, T]

        own = torch.eye(scores.shape[-1], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(own, torch.inf)
        return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, filled: Tensor | None) -> Tensor:
    """Attend by copying the chosen keys and values of each tile: [B, H, T, P, d] -> the same shape.

    Args:
        q: queries in tiles.
        k: keys in tiles.
        v: values in tiles.
        chosen: the result of `choose_tiles`.
        filled: which places have a patch, bool [T, P]; None = all.
    """
    kind, (batch, heads, tiles, places, _) = q.dtype, q.shape
    if kind == torch.bfloat16 and q.device.type == "cpu":
        # as in `attention`: torch's bf16 backward pass is slow there
        q, k, v = q.float(), k.float(), v.float()

    flat = chosen + tiles * torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    flat = flat.flatten(0, 2)  # [B H T, count]
    queries, keys, values = (x.flatten(0, 2) for x in (q, k, v))  # 3 x [B H T, P, d]
    mask = None if filled is None else filled[chosen].flatten(3).flatten(0, 2)[:, None]  # [B H T, 1, count P]

    # Some tiles at a time, whose copies fit into a cache. With gradients all copies are kept in any case, and
    # a compiled graph would have a copy of the loop's body for each turn.
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    step = len(flat) if kept or torch.compiler.is_compiling() else TILES_AT_ONCE
    parts = []
    for start in range(0, len(flat), step):
        own = slice(start, start + step)
        read = flat[own].flatten()
        k_own, v_own = (
            x.index_select(0, read).view(len(queries[own]), -1, x.shape[-1]) for x in (keys, values)
        )  # [tiles, count P, d]
        mask_own = None if mask is None else mask[own]
        parts.append(F.scaled_dot_product_attention(queries[own], k_own, v_own, attn_mask=mask_own))
    return torch.cat(parts).view(batch, heads, tiles, places, -1).to(kind)


def flex_mask(chosen: Tensor, filled: Tensor | None, places: int) -> Any:
    """Return FlexAttention's mask: blocks are tiles of `places` places; arguments as in `attend_gathered`."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, heads, tiles, count = chosen.shape
    picked = torch.zeros(batch, heads, tiles, tiles, dtype=torch.bool, device=chosen.device)
    picked = picked.scatter(3, chosen, True)
    # Tiles that are not chosen follow the chosen ones, and are not counted.
    order = picked.int().argsort(dim=-1, descending=True, stable=True).int()
    counts = torch.full((batch, heads, tiles), count, dtype=torch.int32, device=chosen.device)

    def in_tiles(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return picked[b, h, query // places, key // places]

    if filled is None:
        # Blocks that are read whole: the kernel does not ask the function.
        none = torch.zeros_like(counts)
        return BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=places, mask_mod=in_tiles)

    there = filled.flatten()

    def has_patch(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_tiles(b, h, query, key) & there[key]

    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=places, mask_mod=has_patch)


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, filled: Tensor | None, compiled: bool = True
) -> Tensor:
    """Attend with torch's FlexAttention, which reads the chosen tiles in place; arguments as in
    `attend_gathered`.

    Args:
        q: queries in tiles.
        k: keys in tiles.
        v: values in tiles.
        chosen: the result of `choose_tiles`.
        filled: which places have a patch.
        compiled: False for the uncompiled form, which is slow and for tests.
    """
    from torch.nn.attention.flex_attention import flex_attention

    tiles, places = q.shape[2:4]

    attend: Any = _compiled_flex() if compiled else flex_attention
    mask = flex_mask(chosen, filled, places)
    out = attend(*(x.flatten(2, 3) for x in (q, k, v)), block_mask=mask)
    return out.unflatten(2, (tiles, places))


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Without `model.compile` nothing else has raised torch's limit.
    allow_graphs()
    return torch.compile(flex_attention, dynamic=False)


class SparseSelfAttention(SelfAttention):
    """Self-attention of tiles; the parameters are those of `SelfAttention`."""

    def __init__(self, width: int, heads: int, config: AttentionConfig) -> None:
        super().__init__(width, heads)
        self.config = config

    def forward_tiles(self, x: Tensor, rows: int, columns: int, shifted: bool) -> Tensor:
        """Let patches x [B, N, D] of a grid attend; `shifted` moves the tiles by half of one."""
        side = self.config.block
        shift = side // 2 if shifted and self.config.shift else 0
        tiles = Tiles(rows, columns, side, shift)
        number = math.prod(tiles.across)

        count = self.config.kept(number)
        if count == number:
            return self(x)

        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # 3 x [B, N, H, d]
        q, k, v = (tiles.cut(part) for part in (self.query_norm(q), self.key_norm(k), v))  # [B, H, T, P, d]
        filled = tiles.patches(x.device)

        chosen = choose_tiles(q, k, filled, count)  # [B, H, T, count]
        attend = attend_flex if x.is_cuda else attend_gathered
        out = attend(q, k, v, chosen, None if tiles.is_filled else filled)
        return self.out(tiles.join(out).flatten(2))
