"""From the states of several frozen LLMs to the text tokens that the DiT attends to (paper section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from model.collaborative_refiner import CollaborativeRefiner
from model.common.errors import UserError
from model.config import DiTConfig, FusionConfig
from model.functional import masked_mean
from model.layers import ConditionEmbedding, Linear, RMSNorm
from model.token_refiner import TokenRefiner


@dataclass
class Text:
    """One LLM's standardised states of a batch of prompts, padded on the right."""

    states: Tensor
    """[B, T, W]: the first `prefix` positions are the prefix, the same in every sample; what padding holds is not read."""
    mask: Tensor
    """bool [B, T]: True = a token, False = padding."""
    prefix: int
    """Tokens of system prompt and instruction before the caption."""
    padded: bool = True
    """False = the caller knows that no position is padding, so that attention may run without a mask."""

    def rows(self, rows: slice) -> "Text":
        """Some of the batch's samples."""
        return replace(self, states=self.states[rows], mask=self.mask[rows])


class TextProjection(nn.Module):
    """From an LLM's states to tokens of the refiners' width.

    The norm comes first since an LLM's first token is hundreds of times larger than the rest, standardised or not.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(inputs)
        self.linear = Linear(inputs, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [B, T, W] to tokens [B, T, R]."""
        return self.linear(self.norm(states.to(self.linear.weight.dtype)))


def refiner_size(config: FusionConfig, dit: DiTConfig) -> tuple[int, int]:
    """Width and heads of the refiners.

    Raises:
        UserError: the heads do not divide the width.
    """
    width, heads = config.width or dit.width, config.heads or dit.heads
    if width % heads:
        raise UserError(f"fusion.width={width} is not a multiple of fusion.heads={heads}: change one of them")
    return width, heads


def collaborates(config: FusionConfig, llms: int) -> bool:
    """Whether there is a collaborative refiner: one LLM alone has no other to attend to."""
    return config.mode == "collaborative" and llms > 1


def reads_time(config: FusionConfig, llms: int) -> bool:
    """Whether any layer of the refiners depends on the timestep."""
    return config.time and (collaborates(config, llms) or (config.refiner != "none" and config.gate))


class TextFusion(nn.Module):
    """The text side of the network.

    Projections bring the LLMs to one width, token refiners let each LLM's tokens see one another, the collaborative
    refiner lets the LLMs see one another; then the prefixes are cut off and the LLMs stand side by side as one sequence.
    """

    def __init__(self, config: FusionConfig, widths: Sequence[int], dit: DiTConfig) -> None:
        """Build one branch per LLM.

        Args:
            config: the switches of the fusion.
            widths: width of each LLM's states, in the order in which `forward` gets the texts.
            dit: sizes of the DiT that reads the tokens.

        Raises:
            UserError: there is no LLM, there are several without fusion, or heads do not divide the width.
        """
        super().__init__()
        if not widths:
            raise UserError("fusion.families is empty: name at least one text family")
        if config.mode == "none" and len(widths) > 1:
            raise UserError(f"fusion.mode=none takes one LLM, not {len(widths)}: set fusion.mode=concat or collaborative")
        width, heads = refiner_size(config, dit)
        hidden = int(dit.mlp_ratio * width)
        self.config = config
        self.projections = nn.ModuleList(TextProjection(states, width) for states in widths)
        self.pools = nn.ModuleList(ConditionEmbedding(width, width) for _ in widths)
        self.time = None
        if reads_time(config, len(widths)):
            self.time = Linear(dit.width, width) if width != dit.width else nn.Identity()
        self.refiners = None
        if config.refiner != "none":
            refiner = partial(TokenRefiner, width, heads, hidden, config.refiner_blocks, config.gate)
            self.refiners = nn.ModuleList(refiner(causal=config.refiner == "causal") for _ in widths)
        self.collaborative = None
        if collaborates(config, len(widths)):
            self.collaborative = CollaborativeRefiner(width, heads, hidden, len(widths), config.collaborative_blocks)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in widths)
        self.tokens_out = Linear(width, dit.width) if width != dit.width else nn.Identity()
        self.pooled_out = Linear(width, dit.width) if width != dit.width else nn.Identity()

    def forward(self, texts: Sequence[Text], time_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fuse the texts of a batch.

        Args:
            texts: one per LLM.
            time_embedding: [B, D].

        Returns:
            Tokens [B, S, D] without any prefix, their mask (bool [B, S]) and the pooled text [B, D].

        Raises:
            ValueError: there is another number of texts than of LLMs.
        """
        if len(texts) != len(self.projections):
            raise ValueError(f"{len(texts)} texts for a network of {len(self.projections)} LLMs")
        padded = any(text.padded for text in texts)
        masks = [text.mask for text in texts]
        prefixes = [text.prefix for text in texts]
        tokens = [project(_clean(text)) for project, text in zip(self.projections, texts, strict=True)]  # [B, T_i, R]

        pooled_from = prefixes if self.config.pool == "caption" else [0] * len(texts)
        means = [masked_mean(x, mask) for x, mask in zip(_cut(tokens, pooled_from), _cut(masks, pooled_from), strict=True)]
        pooled = [pool(mean) for pool, mean in zip(self.pools, means, strict=True)]  # [B, R]
        time = self.time(time_embedding) if self.time is not None else 0
        conditions = [time + vector for vector in pooled]  # [B, R]

        if self.config.crop == "before":
            tokens, masks, prefixes = _cut(tokens, prefixes), _cut(masks, prefixes), [0] * len(texts)
        unread = prefixes if self.collaborative is None else [0] * len(texts)  # after the token refiners
        if self.refiners is not None:
            branches = zip(self.refiners, tokens, masks, conditions, unread, strict=True)
            tokens = [refine(x, mask if padded else None, c, cut) for refine, x, mask, c, cut in branches]  # [B, T_i, R]
        else:
            tokens = _cut(tokens, unread)  # [B, T_i, R]
        if self.collaborative is not None:
            tokens = self.collaborative(tokens, masks if padded else None, conditions, prefixes)  # [B, S_i, R]

        tokens = torch.cat([norm(x) for norm, x in zip(self.norms, tokens, strict=True)], dim=1)  # [B, S, R]
        mask = torch.cat(_cut(masks, prefixes), dim=1)  # [B, S]
        return self.tokens_out(tokens), mask, self.pooled_out(torch.stack(pooled).mean(dim=0))


def _clean(text: Text) -> Tensor:
    """States with zeros for padding, so that nothing depends on what stood there (a masked NaN is still a NaN)."""
    return text.states.masked_fill(~text.mask[..., None], 0) if text.padded else text.states


def _cut(items: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Cut each of `items` [B, T_i, ...] at the front."""
    return [item[:, length:] for item, length in zip(items, lengths, strict=True)]
