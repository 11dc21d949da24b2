"""Linguistic token refiner: lets every token of one LLM see the whole prompt (paper section 3.1)."""

from torch import Tensor, nn

from model.functional import key_mask, residual
from model.layers import MLP, Modulation, RMSNorm, SelfAttention


class TokenRefinerBlock(nn.Module):
    """Self-attention and feed-forward layer, each behind an adaptive gate that starts at zero."""

    def __init__(self, width: int, heads: int, hidden: int, gate: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = MLP(width, hidden)
        self.gates = Modulation(width, 2) if gate else None

    def forward(self, x: Tensor, mask: Tensor | None, c: Tensor, causal: bool, first: int) -> Tensor:
        """Refine tokens x [B, T, R] from `first` on under the condition c [B, R]; `mask` is the result of
        `key_mask`."""
        gate_attention, gate_mlp = self.gates(c) if self.gates is not None else (None, None)
        # Nothing is cut before the attention, because tokens before `first` are read as keys.
        change = self.attention(self.attention_norm(x), mask, causal, first)  # [B, T - first, R]
        x = residual(x[:, first:], change, gate_attention)
        return residual(x, self.mlp(self.mlp_norm(x)), gate_mlp)


class TokenRefiner(nn.Module):
    """Refiner of one LLM's tokens.

    A decoder-only LLM's causal attention keeps early tokens from later ones, so this attention has no causal
    mask; `causal` puts it back, as the paper's table 3 does to show that it matters.
    """

    def __init__(self, width: int, heads: int, hidden: int, blocks: int, gate: bool, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(TokenRefinerBlock(width, heads, hidden, gate) for _ in range(blocks))

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
        last = self.blocks[-1]
        for block in self.blocks:
            x = block(
                x, keys, c, self.causal, first if block is last else 0
            )  # [B, T, R], at last [B, T - first, R]
        return x
