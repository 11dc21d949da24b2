"""Settings of the blocks' self-attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.common.errors import UserError
from model.common.settings import bounded

LEAST_PATCHES = 1_024
"""Below so many patches, dense attention costs less than the choice of tiles."""


@dataclass
class AttentionConfig:
    """Self-attention of the blocks (after ElasticDiT, arXiv 2605.15684)."""

    kind: Literal["dense", "block_sparse"] = "dense"
    """`dense`: each patch attends to all; `block_sparse`: tiles of patches attend to their own tile and to
    the few others that fit best, which needs images of at least 1,024 patches."""
    block: int = bounded(8, 2, 64)
    """Side of a tile, in patches; on a GPU 4, 8, 16, 32 or 64."""
    keep: float = bounded(0.16, 0.0, 1.0)
    """Share of the tiles that a tile attends to, its own always among them."""
    shift: bool = True
    """True = tiles are shifted by half of one in every second block."""

    @property
    def sparse(self) -> bool:
        """True if attention is not dense."""
        return self.kind != "dense"

    def kept(self, tiles: int) -> int:
        """Return the number of tiles that a tile attends to, of so many."""
        return min(tiles, max(1, round(self.keep * tiles)))

    def keys(self, patches: int) -> int:
        """Return the number of keys that a patch attends to, of so many patches."""
        if not self.sparse:
            return patches
        tiles = math.ceil(patches / self.block**2)
        return min(patches, self.kept(tiles) * self.block**2)

    def check_device(self, kind: str) -> None:
        """Check that a kind of device, such as `cuda`, has a kernel for the tiles.

        Raises:
            UserError: if it has none.
        """
        # FlexAttention's kernels divide a tile's patches into blocks of a power of two, of at least 16.
        side = self.block
        if self.sparse and kind == "cuda" and (side < 4 or side & (side - 1)):
            raise UserError(
                f"model.attention.block={side}: on a GPU a tile has a power of two of patches, at least 16: "
                "set 4, 8, 16, 32 or 64"
            )

    def check(self, grid: Sequence[int]) -> None:
        """Check that a grid of patches is large enough, and one of images.

        Raises:
            UserError: if it is not.
        """
        if not self.sparse:
            return
        patches = math.prod(grid)
        if len(grid) != 2:
            raise UserError("model.attention.kind=block_sparse is for images, not for clips: set dense")
        if patches < LEAST_PATCHES:
            raise UserError(
                f"model.attention.kind=block_sparse: {' x '.join(map(str, grid))} are {patches:,} patches, "
                f"and below {LEAST_PATCHES:,} dense attention costs less: set model.attention.kind=dense"
            )
