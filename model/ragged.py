"""Ragged text: the tokens of all samples one after another, without padding.

Padded to the longest caption, about half of the text that a network reads is padding. Ragged tokens are
[1, N, D], N tokens of B samples in a single row: a layer that maps each token by itself reads them as others.
`Rows` says where each sample's tokens are, for attention, means and conditions.

The functions below take both kinds of text, by what says which tokens there are: a mask or `Rows`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.functional import attention, key_mask, masked_mean


class Rows(NamedTuple):
    """Places of the tokens of each sample; all tensors, so that it passes through hooks and compiled code."""

    starts: Tensor
    """int32 [B + 1]: first token of each sample, and the end of the last."""
    owner: Tensor
    """int64 [N]: sample of each token."""
    place: Tensor
    """int64 [N]: place of each token among padded ones, [B * T]."""
    shown: Tensor
    """bool [B, 1, 1, T]: the tokens among padded ones, as `key_mask` returns them; T is at least the longest
    sample's length."""

    @classmethod
    def of_lengths(cls, lengths: Tensor, total: int, longest: int) -> "Rows":
        """Return the places of samples of some lengths.

        Args:
            lengths: int64 [B], on the device, from which nothing is read back.
            total: their sum.
            longest: at least the largest of them.
        """
        device, starts = lengths.device, F.pad(lengths.cumsum(0), (1, 0))

        samples = torch.arange(len(lengths), device=device)
        owner = torch.repeat_interleave(samples, lengths, output_size=total)
        place = torch.arange(total, device=device) - starts[owner] + longest * owner
        shown = torch.arange(longest, device=device) < lengths[:, None]  # [B, T]
        return cls(starts.int(), owner, place, key_mask(shown))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, int64 [B]."""
        return self.starts.diff().long()

    @property
    def positions(self) -> Tensor:
        """Place of each token in its sample, int64 [N]."""
        return self.place - self.shown.shape[-1] * self.owner

    def one_hot(self, dtype: torch.dtype) -> Tensor:
        """Return the sample of each token, one-hot [1, N, B]."""
        # By comparison: `one_hot` reads its argument, which a compiled graph cannot.
        samples = torch.arange(len(self.shown), device=self.owner.device)
        return (self.owner[:, None] == samples).to(dtype)[None]

    def pad(self, x: Tensor) -> Tensor:
        """Return tokens [1, N, ...] with zeros as padding, [B, T, ...]."""
        samples, longest = len(self.shown), self.shown.shape[-1]
        zeros = x.new_zeros(samples * longest, *x.shape[2:])
        return zeros.index_copy(0, self.place, x[0]).unflatten(0, (samples, longest))

    def unpad(self, x: Tensor) -> Tensor:
        """Undo `pad`."""
        return x.flatten(0, 1).index_select(0, self.place)[None]

    def after(self, first: int) -> "tuple[Tensor, Rows]":
        """Return the tokens that are left if `first` of each sample are cut off at its front: their numbers
        int64 [N'], and their places."""
        samples, longest = len(self.shown), self.shown.shape[-1]
        total = len(self.owner) - first * samples

        left = Rows.of_lengths(self.lengths - first, total, longest - first)
        kept = torch.arange(total, device=self.owner.device) + first * (left.owner + 1)
        return kept, left


Shown = Tensor | Rows
"""Tokens that there are: bool [B, T] for padded ones, `Rows` for ragged ones."""


def cut_front(x: Tensor, shown: Shown | None, first: int) -> tuple[Tensor, Shown | None]:
    """Cut off the first tokens of each sample: of [B, T, D], or ragged of [1, N, D]; None = no padding."""
    if not isinstance(shown, Rows):
        return x[:, first:], None if shown is None else shown[:, first:]
    if not first:
        return x, shown

    kept, left = shown.after(first)
    return x.index_select(1, kept), left


def mean_of_samples(x: Tensor, shown: Shown, first: int) -> Tensor:
    """Return the mean [B, D] of each sample's tokens from `first` on, summed in fp32."""
    if not isinstance(shown, Rows):
        return masked_mean(x[:, first:], shown[:, first:])
    # A product and not a sum by index, whose order is not fixed on a GPU.
    counted = shown.one_hot(torch.float32)[0] * (shown.positions >= first)[:, None]  # [N, B]
    total = counted.t() @ x[0].float()
    return (total / counted.sum(dim=0).clamp(min=1)[:, None]).to(x.dtype)


class Joint(NamedTuple):
    """Several texts of the same samples as one, sample by sample."""

    shown: Shown
    """Tokens that there are in it."""
    places: Tensor | None = None
    """int64 [N]: place of each token of the texts one after another; None = each has its own."""

    @classmethod
    def of(cls, texts: Sequence[Shown]) -> "Joint":
        """Return the texts' places in one; all are padded, or all ragged."""
        rows = [text for text in texts if isinstance(text, Rows)]
        if not rows:
            return cls(torch.cat([text for text in texts if isinstance(text, Tensor)], dim=1))
        if len(rows) == 1:
            return cls(rows[0])

        longest = sum(text.shown.shape[-1] for text in rows)
        total = sum(len(text.owner) for text in rows)
        lengths = torch.stack([text.lengths for text in rows])  # [texts, B]
        joined = Rows.of_lengths(lengths.sum(dim=0), total, longest)
        before = joined.starts[:-1] + lengths.cumsum(dim=0) - lengths  # [texts, B]
        places = [first[text.owner] + text.positions for first, text in zip(before, rows, strict=True)]
        return cls(joined, torch.cat(places))

    def tokens(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the texts' tokens [B, T_i, D] as [B, T, D]; ragged, [1, N_i, D] as [1, N, D]."""
        tokens = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        if self.places is None:
            return tokens

        return torch.empty_like(tokens).index_copy(1, self.places, tokens)


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Rows | None, keys: Rows, causal: bool = False
) -> Tensor:
    """Do what `attention` does with ragged keys.

    A GPU reads the tokens as they are. Elsewhere, and in fp32, they are padded for the attention alone.

    Args:
        q: ragged queries [1, M, H, d]; or the same number for each sample, [B, S, H, d].
        k: keys [1, N, H, d].
        v: values [1, N, H, d].
        queries: places of ragged queries, else None.
        keys: places of the keys.
        causal: as in `attention`.

    Returns:
        The heads concatenated: [1, M, H * d] or [B, S, H * d].
    """
    if not causal and has_kernel(q):
        return _unpadded_attention(q, k, v, queries, keys)

    padded = q if queries is None else queries.pad(q)
    # Padding on the right is later than any token.
    mask = None if causal else keys.shown
    out = attention(padded, keys.pad(k), keys.pad(v), mask, causal)
    return out if queries is None else queries.unpad(out)


def has_kernel(q: Tensor) -> bool:
    """Return True if queries are on a GPU, and its kernels for rows of any length take their type and size
    and are among those of `engine.attention`."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return False
    return torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.cudnn_sdp_enabled()


def _unpadded_attention(q: Tensor, k: Tensor, v: Tensor, queries: Rows | None, keys: Rows) -> Tensor:
    # torch before 2.10 lacks it.
    from torch.nn.attention.varlen import varlen_attn

    samples, longest = q.shape[:2]
    if queries is None:
        starts = torch.arange(samples + 1, device=q.device, dtype=torch.int32) * longest
    else:
        starts, longest = queries.starts, queries.shown.shape[-1]

    # The lengths are bounds and not read from the device: kernels are planned once for many batches.
    out = varlen_attn(
        q.flatten(0, 1),
        k[0].contiguous(),
        v[0].contiguous(),
        starts,
        keys.starts,
        longest,
        keys.shown.shape[-1],
    )
    assert isinstance(out, Tensor)
    return out.view(*q.shape[:2], -1)
