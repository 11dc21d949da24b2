"""All types of blocks of the DiT: the module of each is imported here, so that its class is registered."""

from model import dit_block  # noqa: F401
from model.block import BLOCKS, Block

__all__ = ["BLOCKS", "Block"]
