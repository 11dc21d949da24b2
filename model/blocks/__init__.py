"""The DiT's block types: a file each, which registers its class; a new file is imported here."""

from model.blocks import dit_block  # noqa: F401
from model.blocks.block import BLOCKS, Block

__all__ = ["BLOCKS", "Block"]
