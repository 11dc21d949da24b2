"""Attention over captions that are packed without padding behind one shared prefix.

A single row of tokens contains the captions one after another, sorted by length. Each caption attends to the
prefix, whose keys and values were computed once, and causally to itself. Captions of equal length form the
rows of a batch. Short captions share a row under a block-diagonal mask, so that the prefix's keys are not
copied once per caption. A GPU in half precision has a kernel for rows of any length, which takes all captions
at once.
"""

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoders.transfer import send
from model.ragged import has_kernel

ROW_TOKENS = 32
"""Tokens of an attention row that short captions share.

The fastest of 1 to 256 on a CPU, by up to 10 % for short captions.
"""
CUDA_LENGTH_STEP = 16
"""On a GPU, lengths are rounded up to a multiple of this inside attention.

Fewer kernels are worth a little padding there.
"""


@dataclass(frozen=True)
class Group:
    """Captions of one length: `rows` rows of `captions` captions, consecutive in the packed row of tokens."""

    start: int
    tokens: int
    """Tokens without padding, from `start`."""
    rows: int
    captions: int
    length: int
    """Tokens of each caption inside attention."""
    index: Tensor | None = None
    """Packed position of every slot, [rows * captions * length]; None if no length was rounded up."""
    inverse: Tensor | None = None
    """Slot of every packed token, [tokens]; None if no length was rounded up."""


@dataclass(frozen=True)
class Spans:
    """Queries and keys of each caption, for one call of a kernel that takes rows of any length."""

    starts: Tensor
    """First packed token of each caption, and the number of all, int32 [captions + 1]."""
    key_starts: Tensor
    """The same among the keys, where each caption's follow the prefix's."""
    keys: Tensor
    """Position of each key among the prefix's tokens and the packed ones behind them, [keys]."""
    longest: int
    """Tokens of the longest caption."""
    longest_keys: int

    @classmethod
    def of(cls, lengths: list[int], prefix: int, device: torch.device) -> "Spans":
        """Lay out captions behind a prefix.

        Args:
            lengths: tokens of each caption, in packing order.
            prefix: tokens of the prefix.
            device: where the kernel runs.
        """
        sizes = torch.tensor(lengths)
        starts = F.pad(sizes.cumsum(0), (1, 0))  # [captions + 1]
        key_starts = starts + prefix * torch.arange(len(lengths) + 1)

        # Of the caption's keys, the first ones are the prefix's.
        caption = torch.arange(len(lengths)).repeat_interleave(sizes + prefix)  # [keys]
        place = torch.arange(len(caption)) - key_starts[caption]
        keys = torch.where(place < prefix, place, place + starts[caption])

        # By one copy, since each takes as long.
        moved = send(torch.cat([starts, key_starts, keys]), device).split([len(starts)] * 2 + [len(keys)])
        longest = max(lengths)
        return cls(moved[0].int(), moved[1].int(), moved[2], longest, longest + prefix)


@dataclass
class Packing:
    """Layout of the packed tokens of one forward pass, which every attention layer gets as a keyword."""

    groups: list[Group]
    prefix: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> keys and values of the prefix, each [1, G, P, d], after rotary embedding."""
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None
    """If given, filled with this pass's keys and values; this is how `prefix` is computed."""
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    """(captions, length, window) -> mask, shared by all layers."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each caption, for kernels that take rows of any length; empty = none is used."""
    spans: dict[torch.device, Spans] = field(default_factory=dict)
    """Filled when the first layer of a device uses such a kernel."""


def plan_groups(
    lengths: list[int],
    row_tokens: int = ROW_TOKENS,
    step: int = 1,
    device: torch.device | None = None,
) -> list[Group]:
    """Group captions for attention.

    Args:
        lengths: tokens of each caption in packing order, not decreasing.
        row_tokens: tokens of a row that short captions share.
        step: round lengths up to multiples of this.
        device: where the groups' indices are needed; None = the CPU.
    """
    groups: list[Group] = []
    start = 0
    for length, members in groupby(lengths, key=lambda length: -(-length // step) * step):
        exact = list(members)
        captions = max(1, row_tokens // length)
        whole = len(exact) // captions * captions
        # Captions that do not fill a row form a last, shorter one.
        for chunk, rows in ((exact[:whole], whole // captions), (exact[whole:], 1)):
            if chunk:
                groups.append(_group(start, chunk, rows, length))
                start += sum(chunk)
    return _on_device(groups, device)


def _on_device(groups: list[Group], device: torch.device | None) -> list[Group]:
    """Move the indices of all groups to a device, by one copy: every layer would need four of a group."""
    indices = [each for group in groups for each in (group.index, group.inverse) if each is not None]
    if device is None or not indices:
        return groups
    moved = iter(send(torch.cat(indices), device).split([len(each) for each in indices]))
    return [
        group if group.index is None else replace(group, index=next(moved), inverse=next(moved))
        for group in groups
    ]


def _group(start: int, lengths: list[int], rows: int, length: int) -> Group:
    tokens, captions = sum(lengths), len(lengths) // rows
    if tokens == len(lengths) * length:
        return Group(start, tokens, rows, captions, length)

    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    slots = torch.arange(length)
    # A slot past the end of a caption repeats its last token: the causal mask hides it from the caption's
    # queries.
    index = start + starts[:, None] + slots.minimum(sizes[:, None] - 1)
    inverse = (torch.arange(len(lengths))[:, None] * length + slots)[slots < sizes[:, None]]
    return Group(start, tokens, rows, captions, length, index.flatten(), inverse)


def block_mask(captions: int, length: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """Return the mask of captions that share a row: each attends to the prefix, and causally to itself.

    Args:
        captions: captions in the row.
        length: tokens of each caption.
        prefix: tokens of the prefix.
        window: if given, a query sees only keys fewer than this many positions back in the caption's own
            sequence.
        device: device of the mask.

    Returns:
        Bool [captions * length, prefix + captions * length], True = attends.
    """
    position = prefix + torch.arange(length, device=device)
    key_position = torch.arange(prefix + length, device=device)
    distance = position[:, None] - key_position  # [length, prefix + length]
    caption = (distance >= 0) & (distance < (window or prefix + length))

    to_prefix = caption[:, :prefix].repeat(captions, 1)
    to_itself = torch.block_diag(*[caption[:, prefix:]] * captions)
    return torch.cat([to_prefix, to_itself.bool()], dim=1)


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
    """Attend over packed captions; the signature is that of transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: [1, H, N, d].
        key: [1, G, N, d], G dividing H.
        value: [1, G, N, d].
        attention_mask: not used; the mask follows from `packing`.
        scaling: factor of the scores; None = d^-0.5.
        packing: layout of the packed tokens.
        sliding_window: positions that a query sees back, if limited.
        softcap: bound of the scores, as in Gemma 2.

    Returns:
        [1, N, H, d], and None instead of attention weights.

    Raises:
        TypeError: if the model does not pass `packing` to its attention layers.
    """
    if packing is None:
        raise TypeError(f"{type(module).__name__} was given no packing")
    # The prefix's keys and values are stored per layer.
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    if packing.recorded is not None:
        packing.recorded[layer] = (key, value)

    prefix = packing.prefix.get(layer)
    if packing.lengths and softcap is None and has_kernel(query):
        return _attend_spans(query, key, value, prefix, packing, scaling, sliding_window), None

    # Captions of different lengths cannot share a batch, so there is one call of the kernel per group.
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [N, H, d]
    for group in packing.groups:
        rows_q, rows_k, rows_v = (
            _rows(tensor, group) for tensor in (query, key, value)
        )  # [rows, H or G, L, d]
        # A view for each row: only `cat` copies the prefix, once per row and not per caption.
        if prefix is not None:
            prefix_k, prefix_v = (shared.expand(group.rows, -1, -1, -1) for shared in prefix)
            rows_k, rows_v = torch.cat([prefix_k, rows_k], dim=2), torch.cat([prefix_v, rows_v], dim=2)

        mask = _mask(packing, group, rows_k.shape[2] - rows_q.shape[2], sliding_window, query.device)
        mixed = _attend(rows_q, rows_k, rows_v, mask, scaling, softcap)  # [rows, H, L, d]
        tokens = mixed.transpose(1, 2).flatten(0, 1)  # [rows * L, H, d]
        # Drop the slots past the ends of captions.
        if group.inverse is not None:
            tokens = tokens[group.inverse.to(tokens.device)]
        output[group.start : group.start + group.tokens] = tokens

    return output[None], None


def _attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attend by one call for all captions; arguments as in `packed_attention`.

    Returns:
        [1, N, H, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    shared = 0 if prefix is None else prefix[0].shape[2]
    spans = packing.spans.get(query.device)
    if spans is None:
        spans = packing.spans[query.device] = Spans.of(packing.lengths, shared, query.device)

    k, v = key, value
    if prefix is not None:
        k, v = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)  # [1, G, P + N, d]
    # The causal mask is aligned with the last key: with more keys than queries, all see the prefix.
    back = -1 if window is None or window >= spans.longest_keys else window - 1
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        k[0].index_select(1, spans.keys).transpose(0, 1).contiguous(),
        v[0].index_select(1, spans.keys).transpose(0, 1).contiguous(),
        spans.starts,
        spans.key_starts,
        spans.longest,
        spans.longest_keys,
        scale=scaling,
        window_size=(back, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def _rows(tensor: Tensor, group: Group) -> Tensor:
    """Return the group's tokens of [1, H, N, d] as [rows, H, captions * length, d]."""
    if group.index is None:
        tokens = tensor[0, :, group.start : group.start + group.tokens]
    else:
        tokens = tensor[0].index_select(1, group.index.to(tensor.device))
    return tokens.unflatten(1, (group.rows, group.captions * group.length)).transpose(0, 1)


def _mask(packing: Packing, group: Group, prefix: int, window: int | None, device: torch.device) -> Tensor:
    if window is not None and prefix + group.length <= window:
        # The window hides nothing, so layers with and without one share a mask.
        window = None
    key = (group.captions, group.length, window)
    if key not in packing.masks:
        packing.masks[key] = block_mask(group.captions, group.length, prefix, window, device)
    return packing.masks[key].to(device)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    # The fused CUDA kernels take a mask or grouped heads, not both.
    if grouped and (softcap is not None or query.is_cuda):
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False

    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )

    # SDPA has no soft cap, so the scores are written out.
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores.float() / softcap) * softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value
