"""Attention over captions packed without padding, all of them behind one shared prefix.

Captions lie one after another in a single row of tokens, sorted by length. Each sees the prefix, whose keys and values
were computed once, and itself, causally. Captions of equal length form rows of a batch; short ones share a row under a
block-diagonal mask, so that the prefix's keys are not copied once per caption.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_TOKENS = 32
"""Captions share an attention row up to this many tokens: measured best of 1 to 256 on a CPU, by up to 10 % for short ones."""
CUDA_LENGTH_STEP = 16
"""On a GPU lengths are rounded up to this inside attention: fewer kernels for a little padding, there alone."""


@dataclass(frozen=True)
class Group:
    """Captions of one length: `rows` rows of `captions` captions, consecutive in the packed row of tokens."""

    start: int
    tokens: int
    """Real tokens, from `start`."""
    rows: int
    captions: int
    length: int
    """Tokens of each caption inside attention."""
    index: Tensor | None = None
    """If lengths were rounded up: packed position of every slot, [rows * captions * length] ..."""
    inverse: Tensor | None = None
    """... and slot of every packed token, [tokens]."""


@dataclass
class Packing:
    """How the tokens of one forward pass are packed; travels to every attention layer as a keyword."""

    groups: list[Group]
    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> keys and values of the prefix, each [1, G, P, d]; rotary embedding already applied."""
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None
    """If given, keys and values of this pass are put here: how the prefix's come about."""
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)


def plan_groups(lengths: list[int], row_tokens: int = ROW_TOKENS, step: int = 1) -> list[Group]:
    """Group captions whose lengths, in packing order, do not decrease; lengths are rounded up to multiples of `step`."""
    groups: list[Group] = []
    start = 0
    for length, members in groupby(lengths, key=lambda length: -(-length // step) * step):
        real = list(members)
        captions = max(1, row_tokens // length)
        whole = len(real) // captions * captions
        for chunk, rows in ((real[:whole], whole // captions), (real[whole:], 1)):
            if chunk:
                groups.append(_group(start, chunk, rows, length))
                start += sum(chunk)
    return groups


def _group(start: int, lengths: list[int], rows: int, length: int) -> Group:
    tokens, captions = sum(lengths), len(lengths) // rows
    if tokens == len(lengths) * length:
        return Group(start, tokens, rows, captions, length)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    slots = torch.arange(length)
    # A slot past a caption's end repeats its last token: causal masking hides it from the caption's own queries.
    index = start + starts[:, None] + slots.minimum(sizes[:, None] - 1)
    inverse = (torch.arange(len(lengths))[:, None] * length + slots)[slots < sizes[:, None]]
    return Group(start, tokens, rows, captions, length, index.flatten(), inverse)


def block_mask(captions: int, length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [captions * length, prefix + captions * length], True = sees: the prefix, and itself causally.

    With `window`, only keys fewer than that many positions back, counted in the caption's own sequence.
    """
    position = prefix + torch.arange(length, device=device)
    key_position = torch.arange(prefix + length, device=device)
    distance = position[:, None] - key_position
    one = (distance >= 0) & (distance < (window or prefix + length))
    shared = one[:, :prefix].repeat(captions, 1)
    own = torch.block_diag(*[one[:, prefix:]] * captions)
    return torch.cat([shared, own.bool()], dim=1)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' `AttentionInterface`: query [1, H, N, d], key and value [1, G, N, d] -> [1, N, H, d].

    Raises:
        TypeError: the model does not hand `packing` down to its attention.
    """
    if packing is None:
        raise TypeError(f"{type(module).__name__} was given no packing")
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    if packing.recorded is not None:
        packing.recorded[layer] = (key, value)
    prefix = packing.prefix.get(layer)
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [N, H, d]
    for group in packing.groups:
        rows_q, rows_k, rows_v = (_rows(tensor, group) for tensor in (query, key, value))  # [rows, H or G, L, d]
        if prefix is not None:
            rows_k, rows_v = (
                torch.cat([shared.expand(group.rows, -1, -1, -1), own], dim=2)
                for shared, own in zip(prefix, (rows_k, rows_v), strict=True)
            )
        mask = _mask(packing, group, rows_k.shape[2] - rows_q.shape[2], sliding_window, query.device)
        mixed = _attend(rows_q, rows_k, rows_v, mask, scaling, softcap)  # [rows, H, L, d]
        tokens = mixed.transpose(1, 2).flatten(0, 1)  # [rows * L, H, d]
        if group.inverse is not None:
            tokens = tokens[group.inverse.to(tokens.device)]
        output[group.start : group.start + group.tokens] = tokens
    return output[None], None


def _rows(tensor: Tensor, group: Group) -> Tensor:
    """The group's tokens of [1, H, N, d] as [rows, H, captions * length, d]."""
    if group.index is None:
        tokens = tensor[0, :, group.start : group.start + group.tokens]
    else:
        tokens = tensor[0].index_select(1, group.index.to(tensor.device))
    return tokens.unflatten(1, (group.rows, group.captions * group.length)).transpose(0, 1)


def _mask(packing: Packing, group: Group, prefix: int, window: int | None, device: torch.device) -> Tensor:
    if window is not None and prefix + group.length <= window:
        window = None
    wanted = (group.captions, group.length, window)
    if wanted not in packing.masks:
        packing.masks[wanted] = block_mask(group.captions, group.length, prefix, window, device)
    return packing.masks[wanted].to(device)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and (softcap is not None or query.is_cuda):  # the fused CUDA kernels take a mask or grouped heads, not both
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores.float() / softcap) * softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value
