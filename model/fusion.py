"""From the hidden states of several frozen LLMs to the text tokens that the DiT attends to (paper section
3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.collaborative_refiner import CollaborativeRefiner
from model.common.errors import UserError
from model.condition import RaggedText, Text
from model.config import DiTConfig, FusionConfig
from model.layers import ConditionEmbedding, Linear, RMSNorm, ZeroLinear
from model.ragged import Joint, Rows, Shown, cut_front, mean_of_samples
from model.token_refiner import TokenRefiner

T = TypeVar("T")


class TextProjection(nn.Module):
    """From an LLM's hidden states to tokens of the refiners' width.

    The norm comes first since an LLM's first token is hundreds of times larger than the rest, standardized or
    not.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(inputs)
        self.linear = Linear(inputs, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [B, T, W] to tokens [B, T, R]."""
        return self.linear(self.norm(states.to(self.linear.weight.dtype)))


class PooledText(nn.Module):
    """From the state of the last token of each caption to a condition; it starts at zero, so that a stage may
    add it."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(inputs)
        self.inner = Linear(inputs, width)
        self.outer = ZeroLinear(width, width)

    def forward(self, text: Text) -> Tensor:
        """Map a text of states [B, T, W] to [B, D]."""
        last = text.mask.sum(dim=1, keepdim=True) - 1  # [B, 1]; padding is on the right
        states = text.states.gather(1, last[..., None].expand(-1, -1, text.states.shape[-1]))[:, 0]  # [B, W]
        return self.outer(F.silu(self.inner(self.norm(states.to(self.inner.weight.dtype)))))


def attended(config: FusionConfig, families: Sequence[T]) -> Sequence[T]:
    """Return those of a value per family whose tokens are attended to: all but the last `fusion.pooled`."""
    return families[: len(families) - config.pooled]


def refiner_size(config: FusionConfig, dit: DiTConfig) -> tuple[int, int]:
    """Return width and heads of the refiners.

    Raises:
        UserError: if the heads do not divide the width.
    """
    width, heads = config.width or dit.width, config.heads or dit.heads
    if width % heads:
        raise UserError(f"fusion.width={width} is not a multiple of fusion.heads={heads}: change one of them")
    return width, heads


def collaborates(config: FusionConfig, llms: int) -> bool:
    """Return True if there is a collaborative refiner: one LLM alone has no other to attend to."""
    return config.mode == "collaborative" and llms > 1


def reads_time(config: FusionConfig, llms: int) -> bool:
    """Return True if any layer of the refiners depends on the timestep."""
    return config.time and (collaborates(config, llms) or (config.refiner != "none" and config.gate))


def prefixes_cut_late(config: FusionConfig, prefixes: Sequence[int]) -> list[int]:
    """Return the lengths of the LLMs' prefixes that the last block of a token refiner cuts off.

    There are none if they are cut before, or if the collaborative refiner still reads them.
    """
    prefixes = attended(config, prefixes)
    late = config.crop == "after" and not collaborates(config, len(prefixes))
    return sorted(set(prefixes)) if late else []


def read_prefixes(config: FusionConfig, prefixes: Sequence[int]) -> list[int]:
    """Return the length of each LLM's prefix as far as the refiners read it: 0 if it is cut before them."""
    return [prefix if config.crop == "after" else 0 for prefix in attended(config, prefixes)]


@dataclass(frozen=True)
class Branch:
    """The layers that one LLM has for itself."""

    project: TextProjection
    pool: ConditionEmbedding | None
    refine: TokenRefiner | None
    norm: RMSNorm


@dataclass
class BranchState:
    """One LLM's tokens on their way through the fusion."""

    tokens: Tensor
    """[B, T, R]; ragged, [1, N, R]"""
    shown: Shown
    """bool [B, T]; rows of ragged tokens"""
    prefix: int
    """Tokens at the front that are still to be cut off."""

    def cut(self) -> "BranchState":
        """Return the state without its prefix."""
        tokens, shown = cut_front(self.tokens, self.shown, self.prefix)
        assert shown is not None
        return BranchState(tokens, shown, 0)

    def shown_captions(self) -> Shown:
        """Return which of the caption's tokens there are."""
        if isinstance(self.shown, Rows):
            return self.shown.after(self.prefix)[1] if self.prefix else self.shown
        return self.shown[:, self.prefix :]


class TextFusion(nn.Module):
    """The text side of the network.

    Projections bring the LLMs to one width, token refiners let each LLM's tokens see one another, the
    collaborative refiner lets the LLMs see one another; then the prefixes are cut off and the LLMs are
    concatenated to one sequence.
    """

    def __init__(self, config: FusionConfig, widths: Sequence[int], dit: DiTConfig) -> None:
        """Build one branch per LLM.

        Args:
            config: the switches of the fusion.
            widths: width of each LLM's hidden states, in the order in which `forward` gets the texts.
            dit: sizes of the DiT that reads the tokens.

        Raises:
            UserError: if there is no LLM, if there are several without fusion, or if heads do not divide the
            width.
        """
        super().__init__()
        if not widths:
            raise UserError("fusion.families is empty: name at least one text family")
        pooled, widths = widths[len(widths) - config.pooled :], attended(config, widths)
        if config.mode == "none" and len(widths) > 1:
            raise UserError(
                f"fusion.mode=none takes one LLM, not {len(widths)}: set fusion.mode=concat or collaborative"
            )
        width, heads = refiner_size(config, dit)
        hidden = int(dit.mlp_ratio * width)
        self.config = config

        # The layers are listed by kind, not by branch: their names are those of every checkpoint, and their
        # order
        # fixes the starting weights.
        self.projections = nn.ModuleList(TextProjection(states, width) for states in widths)
        pools = config.pool != "none"
        self.pools = nn.ModuleList(ConditionEmbedding(width, width) for _ in widths) if pools else None
        self.time = None
        if reads_time(config, len(widths)):
            self.time = Linear(dit.width, width) if width != dit.width else nn.Identity()
        self.refiners = None
        if config.refiner != "none":
            refiner = partial(TokenRefiner, width, heads, hidden, config.refiner_blocks, config.gate)
            self.refiners = nn.ModuleList(refiner(causal=config.refiner == "causal") for _ in widths)
        self.collaborative = None
        if collaborates(config, len(widths)):
            self.collaborative = CollaborativeRefiner(
                width, heads, hidden, len(widths), config.collaborative_blocks
            )
        self.norms = nn.ModuleList(RMSNorm(width) for _ in widths)
        self.tokens_out = Linear(width, dit.width) if width != dit.width else nn.Identity()
        self.pooled_out = Linear(width, dit.width) if pools and width != dit.width else nn.Identity()
        self.vectors = nn.ModuleList(PooledText(states, dit.width) for states in pooled)

    @property
    def branches(self) -> list[Branch]:
        """The layers of each LLM, in order."""
        absent = [None] * len(self.projections)
        pools = self.pools if self.pools is not None else absent
        refiners = self.refiners if self.refiners is not None else absent
        layers = zip(self.projections, pools, refiners, self.norms, strict=True)
        return [Branch(*of_llm) for of_llm in layers]  # type: ignore[arg-type]

    def forward(
        self, texts: Sequence[Text | RaggedText], time_embedding: Tensor
    ) -> tuple[Tensor, Shown, Tensor]:
        """Fuse the texts of a batch.

        Args:
            texts: one per LLM; those that are attended to are all padded or all ragged.
            time_embedding: [B, D].

        Returns:
            Tokens [B, S, D] without any prefix, their mask (bool [B, S]) and the pooled text [B, D]. Of
            ragged texts, tokens [1, S, D] and their rows.

        Raises:
            ValueError: if the number of texts is not that of the LLMs.
        """
        llms = len(self.projections) + len(self.vectors)
        if len(texts) != llms:
            raise ValueError(f"{len(texts)} texts for a network of {llms} LLMs")
        of_vectors, texts = texts[len(self.projections) :], attended(self.config, texts)
        branches = self.branches
        # Ragged texts always say where their tokens are.
        masked = any(text.padded or isinstance(text, RaggedText) for text in texts)

        # 1. bring every LLM to the refiners' width
        states = [
            BranchState(branch.project(zero_padding(text)), text.shown, text.prefix)  # [B, T_i, R]
            for branch, text in zip(branches, texts, strict=True)
        ]

        # 2. pool the captions; with the time, they condition the refiners
        nothing = states[0].tokens.new_zeros(len(time_embedding), states[0].tokens.shape[-1])
        pooled = [
            nothing if branch.pool is None else branch.pool(self.mean_token(state))
            for branch, state in zip(branches, states, strict=True)
        ]  # [B, R]
        time = self.time(time_embedding) if self.time is not None else 0
        conditions = [time + vector for vector in pooled]  # [B, R]

        # 3. let each LLM's tokens see one another
        if self.config.crop == "before":
            states = [state.cut() for state in states]
        for branch, state, c in zip(branches, states, conditions, strict=True):
            self.refine(branch, state, c, masked)  # [B, T_i, R]

        # 4. let the LLMs see one another
        if self.collaborative is not None:
            tokens, shown = [state.tokens for state in states], [state.shown for state in states]
            prefixes = [state.prefix for state in states]
            refined = self.collaborative(
                tokens, shown if masked else None, conditions, prefixes
            )  # [B, S_i, R]
            for state, own in zip(states, refined, strict=True):
                state.tokens = own

        # 5. concatenate the captions of all LLMs
        normed = [branch.norm(state.tokens) for branch, state in zip(branches, states, strict=True)]
        joint = Joint.of([state.shown_captions() for state in states])
        tokens = self.tokens_out(joint.tokens(normed))  # [B, S, D]
        if self.pools is None:
            vector = tokens.new_zeros(len(time_embedding), tokens.shape[-1])  # [B, D]
        else:
            vector = self.pooled_out(torch.stack(pooled).mean(dim=0))  # [B, D]
        for layer, text in zip(self.vectors, of_vectors, strict=True):
            vector = vector + layer(text)
        return tokens, joint.shown, vector

    def mean_token(self, state: BranchState) -> Tensor:
        """Return the mean [B, R] of a branch's caption tokens, or with `fusion.pool=all` of all its
        tokens."""
        first = state.prefix if self.config.pool == "caption" else 0
        return mean_of_samples(state.tokens, state.shown, first)

    def refine(self, branch: Branch, state: BranchState, c: Tensor, masked: bool) -> None:
        """Run a branch's token refiner in place; the prefix is cut off unless the collaborative refiner reads
        it."""
        unread = 0 if self.collaborative is not None else state.prefix
        if branch.refine is not None:
            state.tokens = branch.refine(state.tokens, state.shown if masked else None, c, unread)
        else:
            state.tokens, _ = cut_front(state.tokens, state.shown, unread)


def zero_padding(text: Text | RaggedText) -> Tensor:
    """Return the states with zeros for padding, so that nothing depends on its values (a masked NaN is still
    a NaN)."""
    if isinstance(text, RaggedText):
        return text.states
    return text.states.masked_fill(~text.mask[..., None], 0) if text.padded else text.states
