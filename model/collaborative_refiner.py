"""Collaborative refiner: lets the tokens of each LLM attend to those of the others (paper section 3.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from model.functional import key_mask, modulate, residual
from model.layers import MLP, CrossAttention, Modulation, RMSNorm
from model.ragged import Joint, Rows, Shown, cut_front
from model.region import ExampleSizes, Region, TextLengths, example_rows

T = TypeVar("T")


class CollaborativeBranch(Region):
    """One LLM's branch of a block: cross-attention to the other LLMs, then a feed-forward layer."""

    text_axes: ClassVar[dict[int, int]] = {0: 1, 1: 1, 2: 3, 4: 3}

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        # `modulate` normalizes the branch's own tokens; those of the others need a norm of their own.
        self.others_norm = RMSNorm(width)
        self.attention = CrossAttention(width, heads)
        self.mlp = MLP(width, hidden)
        self.modulation = Modulation(width, 6)

    def forward(
        self,
        x: Tensor,
        others: Tensor,
        others_mask: Tensor | Rows | None,
        c: Tensor,
        rows: Rows | None = None,
    ) -> Tensor:
        """Refine tokens by those of the others.

        Args:
            x: tokens [B, T, R]; ragged, [1, M, R].
            others: the others' tokens [B, S, R]; ragged, [1, N, R].
            others_mask: the result of `key_mask` for them; their rows if they are ragged.
            c: condition [B, R].
            rows: those of ragged x.
        """
        vectors = self.modulation(c, rows)  # 6 x [B, 1, R], ragged 6 x [1, M, R]
        shift, scale, gate = vectors[0:3]
        modulated = modulate(x, shift, scale)
        change = self.attention(modulated, self.others_norm(others), others_mask, rows)
        x = residual(x, change, gate)  # [B, T, R]
        shift, scale, gate = vectors[3:6]
        return residual(x, self.mlp(modulate(x, shift, scale)), gate)  # [B, T, R]

    def example_inputs(self, sizes: ExampleSizes) -> list[tuple[Any, ...]]:
        """Return arguments for `forward`."""
        weight, width = self.mlp.up.weight, self.mlp.up.in_features
        samples, tokens = sizes.samples, sizes.text.tokens
        # Another length, since equal ones would be taken for one size.
        others = sizes.text.others or 2 * tokens

        c = weight.new_zeros(samples, width, requires_grad=True)
        if sizes.ragged:
            x, rows = example_rows(weight, samples, tokens, width)
            read, others_rows = example_rows(weight, samples, others, width)
            return [(x, read, others_rows, c, rows)]

        x = weight.new_zeros(samples, tokens, width, requires_grad=True)
        read = weight.new_zeros(samples, others, width, requires_grad=True)
        mask = weight.new_ones(samples, 1, 1, others).bool() if sizes.padded else None
        return [(x, read, mask, c)]

    @classmethod
    def text_lengths(
        cls, captions: Sequence[int], prefixes: Sequence[int], cuts: Sequence[int]
    ) -> set[TextLengths]:
        """Return the lengths of each LLM's tokens and of the others', with the prefix and without it."""
        total, found = sum(captions) + sum(prefixes), set()

        for caption, prefix in zip(captions, prefixes, strict=True):
            others = total - caption - prefix
            found |= {TextLengths(caption + prefix, others=others), TextLengths(caption, others=others)}
        return found


class CollaborativeBlock(nn.Module):
    """One branch per LLM, in parallel: each reads the others as they were before the block."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(CollaborativeBranch(width, heads, hidden) for _ in range(branches))

    def forward(
        self,
        tokens: Sequence[Tensor],
        shown: Sequence[Shown | None],
        others: Sequence[Joint | None],
        keys: Sequence[Tensor | Rows | None],
        conditions: Sequence[Tensor],
        cuts: Sequence[int],
    ) -> list[Tensor]:
        """Refine each LLM's tokens [B, T_i, R] from position `cuts[i]` on, where `shown[i]` says which there
        are, `others[i]` joins those of the others if they are ragged, and `keys[i]` shows them."""
        refined = []
        for own, branch in enumerate(self.branches):
            x, rows = cut_front(tokens[own], shown[own], cuts[own])

            read, joint = _without(tokens, own), others[own]
            read = torch.cat(read, dim=1) if joint is None else joint.tokens(read)
            # Contiguous, since a compiled branch has a graph of its own for other strides.
            inputs = (x.contiguous(), read, keys[own], conditions[own])
            refined.append(branch(*inputs, rows) if isinstance(rows, Rows) else branch(*inputs))
        return refined


class CollaborativeRefiner(nn.Module):
    """Blocks of `CollaborativeBlock`, then the cut of the prefixes."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CollaborativeBlock(width, heads, hidden, branches) for _ in range(blocks))

    def forward(
        self,
        tokens: Sequence[Tensor],
        shown: Sequence[Shown] | None,
        conditions: Sequence[Tensor],
        prefixes: Sequence[int],
    ) -> list[Tensor]:
        """Refine each LLM's tokens by the others' and cut off the prefixes.

        The last block computes only the tokens that stay: as a query, a prefix token changes no token but
        itself.

        Args:
            tokens: [B, T_i, R] of each LLM; ragged, [1, N_i, R].
            shown: bool [B, T_i] of each LLM, or None if nothing is padded; rows of ragged tokens.
            conditions: [B, R] of each LLM.
            prefixes: how many tokens to cut off at the front of each LLM's.

        Returns:
            [B, T_i - prefix_i, R] of each LLM; ragged, [1, N_i - prefix_i * B, R].
        """
        # Made once: every block reads all tokens as keys, and even the last one cuts only queries.
        others: list[Joint | None] = [None] * len(tokens)
        keys: list[Tensor | Rows | None] = [None] * len(tokens)
        for own in range(len(shown or ())):
            joint = Joint.of(_without(shown or (), own))
            if isinstance(joint.shown, Rows):
                others[own], keys[own] = joint, joint.shown
            else:
                keys[own] = key_mask(joint.shown)

        own_shown = [None] * len(tokens) if shown is None else shown
        last = self.blocks[-1]
        for block in self.blocks:
            cuts = prefixes if block is last else [0] * len(tokens)
            tokens = block(tokens, own_shown, others, keys, conditions, cuts)
        return list(tokens)


def _without(items: Sequence[T], own: int) -> list[T]:
    """Return all but one of the branches' items."""
    return [item for branch, item in enumerate(items) if branch != own]
