"""From stored or fresh states of a frozen LLM to the `Text` that the network reads, on the training device.

Captions travel ragged and quantised, one after another; they are dequantised, given their prefix and padded only after the
copy to the device, so the copy carries neither padding nor the prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.dataset.schema import Family
from data_prep.dataset.snapshot_reader import read_constants
from data_prep.store.store import Store
from model.common.errors import UserError
from model.condition import Text
from model.encoders.quantize import dequantize, quantize


@dataclass
class TextConstants:
    """What all captions of a text family share; states are standardised, fp32, on the training device."""

    prefix: Tensor
    """[P, W]: states of system prompt and instruction."""
    null: Tensor
    """[T0, W]: states of the null caption."""
    mean: Tensor
    """[W]: mean of each channel of the raw states."""
    std: Tensor
    """[W]: spread of each channel."""
    quantisation: str
    width: int
    rescale: Tensor | None = None
    """[S, 2, W]: factor and shift that bring standardised states of each dataset of a mixture to this standardisation; None
    where it is the same for all."""

    @classmethod
    def load(cls, dataset: Store, family: Family, device: torch.device) -> "TextConstants":
        """Read them from the store.

        Raises:
            UserError: the family lacks some of them, or is damaged.
        """
        tensors = read_constants(dataset, family)
        if lacking := {"prefix_states", "null_states", "mean", "spread"} - set(tensors):
            raise UserError(f"{dataset.uri}: family `{family.name}` lacks {', '.join(sorted(lacking))}: encode it anew")
        mean, std = tensors["mean"].float(), tensors["spread"].float()
        prefix, null = ((tensors[f"{name}_states"].float() - mean) / std for name in ("prefix", "null"))
        width, quantisation = int(family.info["width"]), str(family.info["quantisation"])
        return cls(prefix.to(device), null.to(device), mean.to(device), std.to(device), quantisation, width)

    def for_all(self, others: "Sequence[TextConstants]") -> "TextConstants":
        """These, for a mixture of their own dataset and then those of `others`, which were standardised with theirs."""
        alike = all(torch.equal(self.mean, other.mean) and torch.equal(self.std, other.std) for other in others)
        if alike or self.quantisation == "bf16":  # bf16 states are stored raw
            return self
        pairs = [torch.stack([c.std / self.std, (c.mean - self.mean) / self.std]) for c in (self, *others)]
        return replace(self, rescale=torch.stack(pairs))


@dataclass
class PackedText:
    """The captions of a batch as stored: quantised tokens one after another, without padding."""

    values: Tensor
    """uint8 [N, bytes]: states of all tokens."""
    scales: Tensor
    """fp32 [N]: scale of each token; empty for bf16."""
    lengths: Tensor
    """int32 [B]: tokens of each caption; 0 = the null caption."""
    counts: Sequence[int] | None = None
    """`lengths` as numbers on the host, so that no shape has to be fetched from the device; None = fetch them."""
    sources: Tensor | None = None
    """int64 [B]: dataset of each caption in a mixture; None = there is one."""


def to_text(packed: PackedText, constants: TextConstants, dtype: torch.dtype) -> Text:
    """Dequantise a batch of captions, put the prefix before each and pad on the right: states [B, T, W] of `dtype`."""
    counts = packed.lengths.tolist() if packed.counts is None else packed.counts
    c = constants
    if c.rescale is None or packed.sources is None:
        tokens = dequantize(packed.values, packed.scales, c.quantisation, c.mean, c.std, dtype)  # [N, W]
    else:
        tokens = dequantize(packed.values, packed.scales, c.quantisation, c.mean, c.std, torch.float32)  # [N, W]
        owner = torch.repeat_interleave(packed.sources, packed.lengths.long(), output_size=len(tokens))  # [N]
        factor, shift = c.rescale[owner].unbind(1)  # [N, W] each
        tokens = torch.addcmul(shift, tokens, factor).to(dtype)
    return _assemble(tokens, packed.lengths, counts, constants)


def pack(states: Sequence[Tensor | None], constants: TextConstants) -> PackedText:
    """Raw states of an LLM, one [T_i, W] per caption, as a family stores them; None or no tokens = the null caption.

    Raises:
        ValueError: a state is not finite.
    """
    device = constants.mean.device
    counts = [0 if caption is None else len(caption) for caption in states]
    captions = [caption.to(device).float() for caption in states if caption is not None]
    tokens = torch.cat([*captions, constants.mean.new_zeros(0, constants.width)])  # [N, W]
    values, scales, _ = quantize(tokens, constants.quantisation, constants.mean, constants.std)
    return PackedText(values, scales, torch.tensor(counts, dtype=torch.int32, device=device), counts)


def text_from_states(states: Sequence[Tensor | None], constants: TextConstants, dtype: torch.dtype) -> Text:
    """The same from raw states of an LLM, one [T_i, W] per caption; None or no tokens = the null caption."""
    device = constants.mean.device
    counts = [0 if caption is None else len(caption) for caption in states]
    captions = [caption.to(device).float() for caption in states if caption is not None]
    tokens = torch.cat([*captions, constants.mean.new_zeros(0, constants.width)])  # [N, W]
    standardised = ((tokens - constants.mean) / constants.std).to(dtype)
    return _assemble(standardised, torch.tensor(counts, dtype=torch.int32, device=device), counts, constants)


def _assemble(tokens: Tensor, lengths: Tensor, counts: Sequence[int], constants: TextConstants) -> Text:
    """Standardised tokens [N, W] of captions with `lengths` [B] -> states with prefix and padding."""
    batch, prefix, null = len(counts), len(constants.prefix), len(constants.null)
    filled = [count or null for count in counts]
    longest = max(filled)
    length, device = prefix + longest, tokens.device
    lengths = lengths.long()
    missing = lengths == 0  # [B]

    states = tokens.new_zeros(batch, length, constants.width)  # [B, T, W]
    states[:, :prefix] = constants.prefix.to(tokens.dtype)
    states[:, prefix : prefix + null] = (missing[:, None, None] * constants.null.to(tokens.dtype))[:, :longest]
    owner = torch.repeat_interleave(torch.arange(batch, device=device), lengths, output_size=len(tokens))  # [N]
    begin = lengths.cumsum(0) - lengths  # [B]
    place = torch.arange(len(tokens), device=device) - begin[owner] + prefix  # [N]
    states.view(batch * length, constants.width).index_copy_(0, owner * length + place, tokens)

    ends = prefix + torch.where(missing, null, lengths)  # [B]
    mask = torch.arange(length, device=device) < ends[:, None]  # [B, T]
    return Text(states, mask, prefix, padded=min(filled) < longest)
