"""Linguistic token refiner: lets every token of one LLM see the whole prompt (paper section 3.1)."""

from typing import Any, ClassVar

from torch import Tensor, nn

from model.functional import key_mask, residual
from model.layers import MLP, Modulation, RMSNorm, SelfAttention
from model.region import Region


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

    def forward(self, x: Tensor, mask: Tensor | None, c: Tensor | None, first: int) -> Tensor:
        """Refine tokens x [B, T, R] from `first` on; `mask` is the result of `key_mask`, and c [B, R] the
        condition of the gates, or None without gates."""
        gate_attention, gate_mlp = self.gates(c) if self.gates is not None else (None, None)
        # Nothing is cut before the attention, because tokens before `first` are read as keys.
        change = self.attention(self.attention_norm(x), mask, self.causal, first)  # [B, T - first, R]
        x = residual(x[:, first:], change, gate_attention)
        return residual(x, self.mlp(self.mlp_norm(x)), gate_mlp)

    def example_inputs(
        self, samples: int, patches: int, text_tokens: int, padded: bool, prefix: int = 0
    ) -> tuple[Any, ...]:
        """Return arguments for `forward`."""
        weight, width = self.mlp.up.weight, self.mlp.up.in_features
        x = weight.new_zeros(samples, prefix + text_tokens, width, requires_grad=True)
        c = weight.new_zeros(samples, width, requires_grad=True) if self.gates is not None else None
        masked = padded and not self.causal
        mask = weight.new_ones(samples, 1, 1, prefix + text_tokens).bool() if masked else None
        return x, mask, c, prefix


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

    def forward(self, x: Tensor, mask: Tensor | None, c: Tensor, first: int = 0) -> Tensor:
        """Refine an LLM's tokens and cut off those before `first`, which no later layer reads.

        The last block computes only the tokens that stay: as a query, another changes no token but itself.

        Args:
            x: tokens [B, T, R], padded on the right.
            mask: bool [B, T], or None if nothing is padded.
            c: condition [B, R].
            first: how many tokens to cut off at the front.

        Returns:
            [B, T - first, R].
        """
        keys = (
            None if mask is None or self.causal else key_mask(mask)
        )  # padding on the right is later than any token
        # An input that is not read would keep the block gathered: ZeRO-3 waits for its gradient.
        condition = c if self.gate else None
        last = self.blocks[-1]
        for block in self.blocks:
            x = block(
                x, keys, condition, first if block is last else 0
            )  # [B, T, R], at last [B, T - first, R]
        return x
