"""Linguistic token refiner: lets every token of one LLM see the whole prompt (paper section 3.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from model.functional import key_mask, residual
from model.layers import MLP, Modulation, RMSNorm, SelfAttention
from model.ragged import Rows, Shown
from model.region import ExampleSizes, Region, TextLengths, example_rows


class TokenRefinerBlock(Region):
    """Self-attention and feed-forward layer, each behind an adaptive gate that starts at zero."""

    text_axes: ClassVar[dict[int, int]] = {0: 1, 1: 3}
    cuts_prefix: ClassVar[bool] = True

    def __init__(self, width: int, heads: int, hidden: int, gate: bool, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = MLP(width, hidden)
        self.gates = Modulation(width, 2) if gate else None

    def forward(self, x: Tensor, mask: Tensor | Rows | None, c: Tensor | None, first: int) -> Tensor:
        """Refine tokens from `first` on.

        Args:
            x: [B, T, R]; ragged, [1, N, R].
            mask: the result of `key_mask`; rows of ragged tokens.
            c: condition of the gates [B, R]; None without gates.
            first: tokens at the front of each sample that are only read.
        """
        kept, rows = None, None
        if isinstance(mask, Rows):
            kept, rows = mask.after(first) if first else (None, mask)
        gate_attention, gate_mlp = self.gates(c, rows) if self.gates is not None else (None, None)

        # Nothing is cut before the attention, because tokens before `first` are read as keys.
        change = self.attention(self.attention_norm(x), mask, self.causal, first)  # [B, T - first, R]
        if rows is None:
            x = x[:, first:]
        elif kept is not None:
            x = x.index_select(1, kept)
        x = residual(x, change, gate_attention)
        return residual(x, self.mlp(self.mlp_norm(x)), gate_mlp)

    def example_inputs(self, sizes: ExampleSizes) -> list[tuple[Any, ...]]:
        """Return arguments for `forward`."""
        weight, width = self.mlp.up.weight, self.mlp.up.in_features
        samples, prefix = sizes.samples, sizes.text.prefix
        tokens = prefix + sizes.text.tokens

        c = weight.new_zeros(samples, width, requires_grad=True) if self.gates is not None else None
        if sizes.ragged:
            x, rows = example_rows(weight, samples, tokens, width)
            return [(x, rows, c, prefix)]

        x = weight.new_zeros(samples, tokens, width, requires_grad=True)
        masked = sizes.padded and not self.causal
        mask = weight.new_ones(samples, 1, 1, tokens).bool() if masked else None
        return [(x, mask, c, prefix)]

    @classmethod
    def text_lengths(
        cls, captions: Sequence[int], prefixes: Sequence[int], cuts: Sequence[int]
    ) -> set[TextLengths]:
        """Return the length of each LLM's tokens, and those at which the last block cuts the prefix."""
        found = set()

        for caption, prefix in zip(captions, prefixes, strict=True):
            found.add(TextLengths(prefix + caption))
            if prefix in cuts:
                found.add(TextLengths(caption, prefix=prefix))
        return found


class TokenRefiner(nn.Module):
    """Refiner of one LLM's tokens.

    A decoder-only LLM's causal attention keeps early tokens from later ones, so this attention has no causal
    mask; `causal` puts it back, as the paper's table 3 does to show that it matters.
    """

    def __init__(self, width: int, heads: int, hidden: int, blocks: int, gate: bool, causal: bool) -> None:
        super().__init__()
        self.causal, self.gate = causal, gate
        self.blocks = nn.ModuleList(
            TokenRefinerBlock(width, heads, hidden, gate, causal) for _ in range(blocks)
        )

    def forward(self, x: Tensor, mask: Shown | None, c: Tensor, first: int = 0) -> Tensor:
        """Refine an LLM's tokens and cut off those before `first`, which no later layer reads.

        The last block computes only the tokens that stay: as a query, another changes no token but itself.

        Args:
            x: tokens [B, T, R], padded on the right; ragged, [1, N, R].
            mask: bool [B, T], or None if nothing is padded; rows of ragged tokens.
            c: condition [B, R].
            first: how many tokens to cut off at the front.

        Returns:
            [B, T - first, R]; ragged, [1, N - first * B, R].
        """
        keys = mask
        if isinstance(mask, Tensor):
            # Padding on the right is later than any token.
            keys = None if self.causal else key_mask(mask)
        # An input that is not read would keep the block gathered: ZeRO-3 waits for its gradient.
        condition = c if self.gate else None
        last = self.blocks[-1]
        for block in self.blocks:
            x = block(
                x, keys, condition, first if block is last else 0
            )  # [B, T, R], at last [B, T - first, R]
        return x
