"""The paper's block: self-attention, cross-attention to the text, feed-forward layer (section 3.2)."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from model.block import BLOCKS, Block
from model.config import DiTConfig
from model.costs import LayerCost, feed_forward, gains, level_spread, linear
from model.functional import modulate, residual
from model.layers import MLP, CrossAttention, Modulation, SelfAttention
from model.ragged import Rows
from model.sparse_attention import SparseSelfAttention


@BLOCKS.register("dit")
class DiTBlock(Block):
    """Self-attention, cross-attention to the text and feed-forward layer, each with its own shift, scale and
    gate."""

    reads_ragged: ClassVar[bool] = True

    def __init__(self, sizes: DiTConfig) -> None:
        super().__init__(sizes)
        width, heads, attention = sizes.width, sizes.heads, sizes.attention
        self.self_attention = (
            SparseSelfAttention(width, heads, attention) if attention.sparse else SelfAttention(width, heads)
        )
        self.cross_attention = CrossAttention(sizes.width, sizes.heads)
        self.mlp = MLP(sizes.width, int(sizes.mlp_ratio * sizes.width))
        # Shift, scale and gate for each of the three sub-layers, from one linear layer.
        self.modulation = Modulation(sizes.width, 9)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | Rows | None,
        c: Tensor,
        places: Tensor | None = None,
        rows: int = 0,
        columns: int = 0,
        number: int = 0,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Run the block; arguments and result as `Block.forward`."""
        vectors = self.modulation(c, places)  # 9 x [B, 1, D] or [B, N, D]

        shift, scale, gate = vectors[0:3]
        change = self._attend(modulate(x, shift, scale), rows, columns, number, rotation)
        x = residual(x, change, gate)  # [B, N, D]

        shift, scale, gate = vectors[3:6]
        x = residual(x, self.cross_attention(modulate(x, shift, scale), text, text_mask), gate)  # [B, N, D]

        shift, scale, gate = vectors[6:9]
        return residual(x, self.mlp(modulate(x, shift, scale)), gate)  # [B, N, D]

    def _attend(self, x: Tensor, rows: int, columns: int, number: int, rotation: Tensor | None) -> Tensor:
        """Let patches [B, N, D] attend to one another."""
        if isinstance(self.self_attention, SparseSelfAttention):
            return self.self_attention.forward_tiles(x, rows, columns, number % 2 == 1)
        return self.self_attention(x, rotation=rotation)

    def text_attention(self) -> CrossAttention:
        """Return the cross-attention."""
        return self.cross_attention

    @classmethod
    def costs(cls, sizes: DiTConfig, patches: int, text_tokens: int) -> Iterator[LayerCost]:
        """Yield the cost of each layer; 25 width^2 parameters for `mlp_ratio` 4."""
        width = sizes.width
        yield linear(width, 9 * width, sizes.time_levels)  # modulation
        yield level_spread(sizes.time_levels, width, 9, patches)
        yield linear(width, 3 * width, patches)  # self-attention
        yield linear(width, width, patches)
        yield linear(width, width, patches)  # cross-attention
        yield linear(width, 2 * width, text_tokens)
        yield linear(width, width, patches)
        yield gains(*[width // sizes.heads] * 4)
        yield from feed_forward(width, sizes.mlp_ratio, patches)

    @classmethod
    def attention(cls, sizes: DiTConfig, patches: int, text_tokens: int) -> int:
        """Return width x queries x keys of both attentions."""
        return sizes.width * patches * (sizes.attention.keys(patches) + text_tokens)

    @classmethod
    def activations(
        cls, sizes: DiTConfig, patches: int, text_tokens: int, budget: float | None = None
    ) -> int:
        """Return the values that are kept; arguments as `Block.activations`."""
        # Values per patch and channel (its input included), per text token and channel, per channel.
        per_patch, per_token, once = 47, 8, 12
        if budget is not None:
            # The compiler keeps what it cannot recompute cheaply; with a budget it recomputes all but matrix
            # products and attention. In between it has nothing to choose from.
            per_patch, per_token = (16, 2) if budget <= 0.9 else (27, 3)
        if sizes.time_levels > 1:
            per_patch += 6  # scales and gates, which all patches share otherwise
        return sizes.width * (per_patch * patches + per_token * text_tokens + once)
