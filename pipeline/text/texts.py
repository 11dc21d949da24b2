"""From stored or fresh hidden states of a frozen LLM to the `Text` that the network reads.

Captions travel ragged and quantized, one after another. They are dequantized, get their prefix and are padded
only after the copy to the device, so the copy contains neither padding nor the prefix.
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
    """Everything that all captions of a text family share.

    Hidden states are standardized, fp32, on the training device.
    """

    prefix: Tensor
    """[P, W]: hidden states of system prompt and instruction."""
    null: Tensor
    """[T0, W]: hidden states of the null caption."""
    mean: Tensor
    """[W]: mean of each channel of the raw hidden states."""
    std: Tensor
    """[W]: std of each channel."""
    quantization: str
    width: int
    rescale: Tensor | None = None
    """[S, 2, W]: per dataset of a mixture, factor and shift from its standardization to this one.

    None if all datasets have the same.
    """

    @classmethod
    def load(cls, dataset: Store, family: Family, device: torch.device) -> "TextConstants":
        """Read a family's constants from the store.

        Raises:
            UserError: if the family lacks some of them, or is damaged.
        """
        tensors = read_constants(dataset, family)
        if lacking := {"prefix_states", "null_states", "mean", "spread"} - set(tensors):
            names = ", ".join(sorted(lacking))
            raise UserError(f"{dataset.uri}: family `{family.name}` lacks {names}: encode it again")

        # `spread` is the name on disk, which stored families keep.
        mean, std = tensors["mean"].float(), tensors["spread"].float()
        # Standardized once here: captions come standardized out of `dequantize`, and both go into one tensor.
        prefix, null = ((tensors[f"{name}_states"].float() - mean) / std for name in ("prefix", "null"))
        width, quantization = int(family.info["width"]), str(family.info["quantisation"])
        return cls(prefix.to(device), null.to(device), mean.to(device), std.to(device), quantization, width)

    def for_all(self, others: "Sequence[TextConstants]") -> "TextConstants":
        """Return the constants for a mixture of this dataset and the datasets of `others`, in this order.

        The hidden states of each dataset were standardized with its own mean and std; `to_text` will bring
        them to these.
        """
        return self.rescaled([self, *others])

    def rescaled(self, stored: "Sequence[TextConstants | None]") -> "TextConstants":
        """Return the constants for hidden states that were standardized in other ways than these.

        Args:
            stored: of each dataset, the constants by which its hidden states were standardized; None = it has
                none.
        """
        known = [constants for constants in stored if constants is not None]
        # bf16 states are stored raw
        if self.quantization == "bf16" or all(constants._scaled_like(self) for constants in known):
            return self
        # x = raw state: (x - m0) / s0 = ((x - m) / s) (s / s0) + (m - m0) / s0. So a factor and a shift
        # suffice.
        pairs = [torch.stack(self._change_from(constants or self)) for constants in stored]
        return replace(self, rescale=torch.stack(pairs))

    def standardized_like(self, other: "TextConstants") -> "TextConstants":
        """Return the same hidden states, standardized with another family's mean and std."""
        if self._scaled_like(other):
            return self

        factor, shift = other._change_from(self)
        prefix, null = (torch.addcmul(shift, states, factor) for states in (self.prefix, self.null))
        return replace(self, prefix=prefix, null=null, mean=other.mean, std=other.std, rescale=None)

    def _scaled_like(self, other: "TextConstants") -> bool:
        """True if both have the same mean and std."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.std, other.std)

    def _change_from(self, other: "TextConstants") -> tuple[Tensor, Tensor]:
        """Return factor and shift [W] from another standardization to this one."""
        return other.std / self.std, (other.mean - self.mean) / self.std


@dataclass
class PackedText:
    """The captions of a batch as stored: quantized tokens one after another, without padding."""

    values: Tensor
    """uint8 [N, bytes]: hidden states of all tokens."""
    scales: Tensor
    """fp32 [N]: scale of each token; empty for bf16."""
    lengths: Tensor
    """int32 [B]: tokens of each caption; 0 = the null caption."""
    counts: Sequence[int] | None = None
    """`lengths` on the host, so that no shape has to be fetched from the device; None = fetch them."""
    sources: Tensor | None = None
    """int64 [B]: dataset of each caption; None = the hidden states have the standardization of the
    constants."""


def padded_length(tokens: int, multiple: int) -> int:
    """Return the number of caption tokens to which captions of at most `tokens` are padded."""
    return -(-tokens // multiple) * multiple


def to_text(packed: PackedText, constants: TextConstants, dtype: torch.dtype, multiple: int = 1) -> Text:
    """Dequantize a batch of captions, put the prefix before each and pad on the right.

    Args:
        packed: the captions.
        constants: of their family.
        dtype: of the result.
        multiple: the captions are padded to a multiple of so many tokens, so that there are few lengths.

    Returns:
        Text with hidden states [B, T, W].
    """
    counts = packed.lengths.tolist() if packed.counts is None else packed.counts
    c = constants
    if c.rescale is None or packed.sources is None:
        tokens = dequantize(packed.values, packed.scales, c.quantization, c.mean, c.std, dtype)  # [N, W]
    else:
        # [N, W] in fp32, so that the change of standardization is rounded only once.
        tokens = dequantize(packed.values, packed.scales, c.quantization, c.mean, c.std, torch.float32)
        owner = torch.repeat_interleave(packed.sources, packed.lengths.long(), output_size=len(tokens))  # [N]
        factor, shift = c.rescale[owner].unbind(1)  # [N, W] each
        tokens = torch.addcmul(shift, tokens, factor).to(dtype)
    return _assemble(tokens, packed.lengths, counts, constants, multiple)


def pack(states: Sequence[Tensor | None], constants: TextConstants) -> PackedText:
    """Quantize raw hidden states of an LLM as a family stores them.

    Args:
        states: one [T_i, W] per caption; None or no tokens = the null caption.
        constants: of the family.

    Raises:
        ValueError: if a hidden state is not finite.
    """
    tokens, lengths, counts = _concatenate(states, constants)
    values, scales, _ = quantize(tokens, constants.quantization, constants.mean, constants.std)
    return PackedText(values, scales, lengths, counts)


def text_from_states(states: Sequence[Tensor | None], constants: TextConstants, dtype: torch.dtype) -> Text:
    """Do the same as `to_text` with raw hidden states of an LLM, without quantizing them.

    Args:
        states: one [T_i, W] per caption; None or no tokens = the null caption.
        constants: of the LLM's family.
        dtype: of the result.
    """
    tokens, lengths, counts = _concatenate(states, constants)
    standardized = ((tokens - constants.mean) / constants.std).to(dtype)
    return _assemble(standardized, lengths, counts, constants)


def _concatenate(
    states: Sequence[Tensor | None], constants: TextConstants
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the tokens of all captions [N, W], and the number of each caption's, on device and on host."""
    device = constants.mean.device
    counts = [0 if caption is None else len(caption) for caption in states]
    captions = [caption.to(device).float() for caption in states if caption is not None]
    # The empty tensor at the end is for batches without any caption, which `cat` would refuse.
    tokens = torch.cat([*captions, constants.mean.new_zeros(0, constants.width)])  # [N, W]
    return tokens, torch.tensor(counts, dtype=torch.int32, device=device), counts


def _assemble(
    tokens: Tensor, lengths: Tensor, counts: Sequence[int], constants: TextConstants, multiple: int = 1
) -> Text:
    """Add prefix and padding to the standardized tokens [N, W] of captions with `lengths` [B]."""
    batch, prefix, null = len(counts), len(constants.prefix), len(constants.null)
    # From host numbers: a shape that comes from the device would wait for all its queued work.
    filled = [count or null for count in counts]
    longest = padded_length(max(filled), multiple)
    length, device = prefix + longest, tokens.device
    lengths = lengths.long()
    missing = lengths == 0  # [B]

    states = tokens.new_zeros(batch, length, constants.width)  # [B, T, W]
    states[:, :prefix] = constants.prefix.to(tokens.dtype)
    # By multiplication instead of indexing, because a boolean index would wait for the device.
    nulls = missing[:, None, None] * constants.null.to(tokens.dtype)  # [B, T0, W], zero for other captions
    # Before the captions, which overwrite the zeros that this leaves in their own rows.
    states[:, prefix : prefix + null] = nulls[:, :longest]

    # One scatter puts each token behind its caption's prefix.
    captions = torch.arange(batch, device=device)
    owner = torch.repeat_interleave(captions, lengths, output_size=len(tokens))  # [N]
    begin = lengths.cumsum(0) - lengths  # [B]
    place = torch.arange(len(tokens), device=device) - begin[owner] + prefix  # [N]
    states.view(batch * length, constants.width).index_copy_(0, owner * length + place, tokens)

    ends = prefix + torch.where(missing, null, lengths)  # [B]
    # Padding is only on the right, so a length per caption is enough.
    mask = torch.arange(length, device=device) < ends[:, None]  # [B, T]
    # `padded` is known on the host, so attention can take its faster kernel without reading the mask.
    return Text(states, mask, prefix, padded=min(filled) < longest)
