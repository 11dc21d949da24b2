"""The interface of every type of block of the DiT, and the registry of types."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from model.common.registry import Registry
from model.config import DiTConfig
from model.costs import LayerCost
from model.layers import CrossAttention
from model.ragged import Rows
from model.region import ExampleSizes, Region, TextLengths, example_rows
from model.rotary import rotation_table


class Block(Region, ABC):
    """One block of the DiT.

    The network, the engine, the compiler, the estimate and the FLOPs formula ask the block for what they need
    to know, so a new type is one file with a class that fills in this interface. `forward` takes and returns
    nothing but tensors, and with sparse attention the grid of patches.
    """

    text_axes: ClassVar[dict[int, int]] = {1: 1, 2: 3}
    reads_ragged: ClassVar[bool] = False
    """True if `forward` takes text without padding (`model/ragged.py`)."""

    def __init__(self, sizes: DiTConfig) -> None:
        """Build the block for the sizes of the DiT."""
        super().__init__()
        self.sizes = sizes

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | Rows | None,
        c: Tensor,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: patches [B, N, D].
            text: text tokens [B, S, D].
            text_mask: the result of `key_mask` for the text, or None if nothing is padded. A block with
                `reads_ragged` also takes the rows of ragged text [1, S, D].
            c: condition, [B, D]; [B, N, D], one for each patch; or [B, K, D], one for each level.
            places: for levels, the level of each patch, one-hot [B, N, K]; `Modulation` takes both.

        With `model.attention.kind=block_sparse` three numbers follow: rows and columns of the grid of
        patches, and the block's number in the order of the forward pass, from 0. With `model.position=rope`
        three zeros follow, and the result of `rotation_table`.

        Returns:
            Patches [B, N, D].
        """

    @classmethod
    @abstractmethod
    def costs(cls, sizes: DiTConfig, patches: int, text_tokens: int) -> Iterator[LayerCost]:
        """Yield the cost of each layer for one sample of `patches` patches and `text_tokens` tokens."""

    @classmethod
    @abstractmethod
    def attention(cls, sizes: DiTConfig, patches: int, text_tokens: int) -> int:
        """Return width x queries x keys, summed over the block's attentions, for one sample."""

    @classmethod
    @abstractmethod
    def activations(
        cls, sizes: DiTConfig, patches: int, text_tokens: int, budget: float | None = None
    ) -> int:
        """Return how many values the block keeps for its backward pass for one sample.

        Args:
            sizes: sizes of the DiT.
            patches: patches of the sample.
            text_tokens: its text tokens.
            budget: `model.activation_memory_budget` of a compiled block; None = not compiled.
        """

    def text_attention(self) -> CrossAttention | None:
        """Return the layer whose attention weights show the text tokens that each patch reads; None if there
        is none."""
        return None

    def example_inputs(self, sizes: ExampleSizes) -> list[tuple[Any, ...]]:
        """Return arguments for `forward`, with sparse attention for tiles with and without a shift; the
        prefixes are not among the text."""
        weight, width, levels = next(self.parameters()), self.sizes.width, self.sizes.time_levels
        samples, tokens = sizes.samples, sizes.text.tokens

        # With gradients, as in training: torch.compile builds another graph for inputs without.
        x = weight.new_zeros(samples, sizes.patches, width, requires_grad=True)
        text = weight.new_zeros(samples, tokens, width, requires_grad=True)
        # A missing mask is another graph, too, since attention then runs without one.
        mask: Any = weight.new_ones(samples, 1, 1, tokens).bool() if sizes.padded else None
        if sizes.ragged:
            text, mask = example_rows(weight, samples, tokens, width)

        by_level = levels > 1
        c = weight.new_zeros(samples, levels, width) if by_level else weight.new_zeros(samples, width)
        inputs = (x, text, mask, c.requires_grad_())
        places = weight.new_zeros(samples, sizes.patches, levels) if by_level else None
        if self.sizes.attention.sparse:
            return [(*inputs, places, *sizes.grid, number) for number in (0, 1)]
        if self.sizes.needs_grid:
            rotation = rotation_table(sizes.grid, width // self.sizes.heads, weight.device)
            return [(*inputs, places, 0, 0, 0, rotation)]
        return [(*inputs, places) if by_level else inputs]

    @classmethod
    def text_lengths(
        cls, captions: Sequence[int], prefixes: Sequence[int], cuts: Sequence[int]
    ) -> set[TextLengths]:
        """Return the length of all captions together."""
        return {TextLengths(sum(captions))}


BLOCKS: Registry[type[Block]] = Registry("model.block")
"""Block types by the name that `model.block` gives."""
