"""Collaborative refiner: lets the tokens of each LLM attend to those of the others (paper section 3.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.functional import key_mask, modulate, residual
from model.layers import MLP, CrossAttention, Modulation, RMSNorm
from model.region import Region


class CollaborativeBranch(Region):
    """One LLM's branch of a block: cross-attention to the other LLMs, then a feed-forward layer."""

    text_axes: ClassVar[dict[int, int]] = {0: 1, 1: 1, 2: 3}

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        # `modulate` normalizes the branch's own tokens; those of the others need a norm of their own.
        self.others_norm = RMSNorm(width)
        self.attention = CrossAttention(width, heads)
        self.mlp = MLP(width, hidden)
        self.modulation = Modulation(width, 6)

    def forward(self, x: Tensor, others: Tensor, others_mask: Tensor | None, c: Tensor) -> Tensor:
        """Refine tokens x [B, T, R] by tokens `others` [B, S, R], where `others_mask` is the result of
        `key_mask`."""
        vectors = self.modulation(c)  # 6 x [B, 1, R]
        shift, scale, gate = vectors[0:3]
        x = residual(
            x, self.attention(modulate(x, shift, scale), self.others_norm(others), others_mask), gate
        )  # [B, T, R]
        shift, scale, gate = vectors[3:6]
        return residual(x, self.mlp(modulate(x, shift, scale)), gate)  # [B, T, R]

    def example_inputs(
        self, samples: int, patches: int, text_tokens: int, padded: bool, prefix: int = 0
    ) -> tuple[Any, ...]:
        """Return arguments for `forward`."""
        weight, width = self.mlp.up.weight, self.mlp.up.in_features
        x = weight.new_zeros(samples, text_tokens, width, requires_grad=True)
        # Another length, since equal ones would be taken for one size.
        shown = 2 * text_tokens
        others = weight.new_zeros(samples, shown, width, requires_grad=True)
        mask = weight.new_ones(samples, 1, 1, shown).bool() if padded else None
        return x, others, mask, weight.new_zeros(samples, width, requires_grad=True)


class CollaborativeBlock(nn.Module):
    """One branch per LLM, in parallel: each reads the others as they were before the block."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(CollaborativeBranch(width, heads, hidden) for _ in range(branches))

    def forward(
        self,
        tokens: Sequence[Tensor],
        keys: Sequence[Tensor | None],
        conditions: Sequence[Tensor],
        cuts: Sequence[int],
    ) -> list[Tensor]:
        """Refine each LLM's tokens [B, T_i, R] from position `cuts[i]` on, where `keys[i]` shows the tokens
        of the others."""
        return [
            # Contiguous, since a compiled branch has a graph of its own for other strides.
            branch(
                tokens[own][:, cuts[own] :].contiguous(),
                _join_others(tokens, own),
                keys[own],
                conditions[own],
            )
            for own, branch in enumerate(self.branches)
        ]


class CollaborativeRefiner(nn.Module):
    """Blocks of `CollaborativeBlock`, then the cut of the prefixes."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CollaborativeBlock(width, heads, hidden, branches) for _ in range(blocks))

    def forward(
        self,
        tokens: Sequence[Tensor],
        masks: Sequence[Tensor] | None,
        conditions: Sequence[Tensor],
        prefixes: Sequence[int],
    ) -> list[Tensor]:
        """Refine each LLM's tokens by the others' and cut off the prefixes.

        The last block computes only the tokens that stay: as a query, a prefix token changes no token but
        itself.

        Args:
            tokens: [B, T_i, R] of each LLM.
            masks: bool [B, T_i] of each LLM, or None if nothing is padded.
            conditions: [B, R] of each LLM.
            prefixes: how many tokens to cut off at the front of each LLM's.

        Returns:
            [B, T_i - prefix_i, R] of each LLM.
        """
        # Made once: every block reads all tokens as keys, and even the last one cuts only queries.
        keys = [None if masks is None else key_mask(_join_others(masks, own)) for own in range(len(tokens))]
        last = self.blocks[-1]
        for block in self.blocks:
            tokens = block(tokens, keys, conditions, prefixes if block is last else [0] * len(tokens))
        return list(tokens)


def _join_others(items: Sequence[Tensor], own: int) -> Tensor:
    """Concatenate all but one of the branches along the sequence."""
    return torch.cat([item for branch, item in enumerate(items) if branch != own], dim=1)
