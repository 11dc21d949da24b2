"""Regions: parts of the network that are gathered whole under ZeRO-3 and compiled as one graph each."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.ragged import Rows

MAX_GRAPHS = 256
"""Graphs of one function; beyond it torch would silently run it uncompiled. The default, 8, is fewer than the
usual buckets."""


def allow_graphs() -> None:
    """Let torch keep a graph of a function for each shape of its inputs."""
    limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    torch._dynamo.config.recompile_limit = limit


class TextLengths(NamedTuple):
    """Lengths of the text that a region reads, padding included."""

    tokens: int
    """Tokens of the text, or of the region's own."""
    prefix: int = 0
    """Tokens before them, which are cut off."""
    others: int = 0
    """Tokens of the other LLMs that the region reads too; 0 = any number."""


class ExampleSizes(NamedTuple):
    """Sizes of a micro-batch that a region is compiled with."""

    samples: int
    grid: tuple[int, ...]
    """Patches of each sample along each axis: height and width, or frames, height and width."""
    text: TextLengths
    padded: bool = True
    """True for a batch whose text is padded, so that there is a mask."""
    ragged: bool = False
    """True for text without padding."""

    @property
    def patches(self) -> int:
        """Patches of a sample."""
        return math.prod(self.grid)


class Region(nn.Module):
    """A repeated part of the network, such as a block.

    As a leaf of ZeRO-3 it is gathered by one hook instead of one for each of its layers, so `forward` takes
    tensors whose gradients show when it may be released: each output depends on each parameter, and each
    parameter is used before the last input has its gradient. `forward` compiles to one graph without breaks.
    """

    text_axes: ClassVar[dict[int, int]] = {}
    """Argument of `forward` -> its axis that has the length of a text, the one size that differs from batch
    to batch."""

    cuts_prefix: ClassVar[bool] = False
    """True if `forward` may cut off an LLM's prefix, whose length is then a constant of the graph."""

    def example_inputs(self, sizes: ExampleSizes) -> list[tuple[Any, ...]]:
        """Return arguments for `forward`, all zeros, as training passes them: the region is compiled with
        each of the tuples."""
        raise NotImplementedError

    @classmethod
    def text_lengths(
        cls, captions: Sequence[int], prefixes: Sequence[int], cuts: Sequence[int]
    ) -> set[TextLengths]:
        """Return the lengths at which a forward pass runs regions of this class; a class that reads text
        overrides it.

        Args:
            captions: tokens of each LLM's captions, padding included.
            prefixes: tokens of each LLM's prefix, as far as the refiners read it.
            cuts: as `prefixes_cut_late` returns them.
        """
        return set()


def example_rows(like: Tensor, samples: int, tokens: int, width: int) -> tuple[Tensor, Rows]:
    """Return ragged tokens, all zeros: `tokens` - 1 of each sample, so that no two sizes are equal.

    Args:
        like: has their device and type.
        samples: number of samples.
        tokens: more than one.
        width: channels of a token.

    Returns:
        Tokens [1, samples * (tokens - 1), width] with a gradient, and their rows.
    """
    lengths = torch.full((samples,), tokens - 1, device=like.device)
    total = samples * (tokens - 1)
    return like.new_zeros(1, total, width, requires_grad=True), Rows.of_lengths(lengths, total, tokens)
