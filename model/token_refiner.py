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

    def forward(self, x: Tensor, mask: Tensor | None, c: Tensor, causal: bool) -> Tensor:
        """Refine tokens x [B, T, R] under the condition c [B, R]; `mask` is what `key_mask` gives."""
        gate_attention, gate_mlp = self.gates(c) if self.gates is not None else (None, None)
        x = residual(x, self.attention(self.attention_norm(x), mask, causal), gate_attention)
        return residual(x, self.mlp(self.mlp_norm(x)), gate_mlp)


class TokenRefiner(nn.Module):
    """Refiner of one LLM's tokens.

    A decoder-only LLM's causal attention keeps early tokens from later ones, so this attention has no causal mask;
    `causal` puts it back, as the paper's table 3 does to show that it matters.
    """

    def __init__(self, width: int, heads: int, hidden: int, blocks: int, gate: bool, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(TokenRefinerBlock(width, heads, hidden, gate) for _ in range(blocks))

    def forward(self, x: Tensor, mask: Tensor | None, c: Tensor) -> Tensor:
        """Refine tokens x [B, T, R], padded on the right as `mask` [B, T] says, under the condition c [B, R]."""
        keys = None if mask is None or self.causal else key_mask(mask)  # padding on the right is later than any token
        for block in self.blocks:
            x = block(x, keys, c, self.causal)
        return x
