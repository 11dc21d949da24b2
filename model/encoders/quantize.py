"""Quantization of LLM hidden states for the store.

LLM hidden states contain massive activations: a few channels are hundreds of times larger than the rest, so
one scale per token alone loses the others (int8: 15 to 229 % error in the worst channel). Therefore channels
are standardized first, with a mean and std measured once per family. Then each token gets one scale: the
error is below 1 % in every channel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.encoders.token_size import BITS

NOT_FINITE = "states are not finite"
RANGE = 8.0
"""Tokens with values beyond this many standard deviations are counted.

The largest value of most tokens is at 3 to 5.
"""


class Quantized(NamedTuple):
    """Quantized hidden states, on the device of the states."""

    values: Tensor
    """uint8 [N, bytes per token]."""
    scales: Tensor
    """fp32 [N]; empty for bf16."""
    outliers: Tensor
    """Number of tokens with values beyond `RANGE` standard deviations, []. They are not clipped (each token
    has its own scale) but quantized more coarsely."""
    finite: Tensor
    """True if all states are finite, []; otherwise the values mean nothing."""


def quantize(states: Tensor, quantization: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, int]:
    """Quantize hidden states; arguments as in `quantize_on_device`.

    Returns:
        Values, scales and the number of outliers, as in `Quantized`.

    Raises:
        ValueError: if a state is not finite.
    """
    result = quantize_on_device(states, quantization, mean, std)
    if not result.finite:
        raise ValueError(NOT_FINITE)
    return result.values, result.scales, int(result.outliers)


def quantize_on_device(states: Tensor, quantization: str, mean: Tensor, std: Tensor) -> Quantized:
    """Quantize hidden states without waiting for a GPU.

    Args:
        states: raw hidden states, fp32 [N, W].
        quantization: a key of `BITS`.
        mean: the family's channel means, fp32 [W].
        std: the family's channel standard deviations, fp32 [W].
    """
    finite = torch.isfinite(states).all()
    if quantization == "bf16":
        values = states.to(torch.bfloat16).contiguous().view(torch.uint8)
        return Quantized(values, states.new_empty(0), finite.new_zeros((), dtype=torch.int64), finite)

    top = 2 ** (BITS[quantization] - 1) - 1
    standard = (states.float() - mean) / std  # [N, W]

    # The range of a token is its largest value. A smaller range reduces the mean error of int4 (13 to 12 %)
    # but increases that of the worst channel (14 to 28 % on Gemma), since the clipped channels are always the
    # same.
    # The lower bound keeps a token of zeros from dividing by zero.
    largest = standard.abs().amax(1).clamp(min=1e-12)  # [N]
    # Symmetric, so that zero is exact and dequantizing is one multiplication.
    scales = largest / top
    levels = (standard / scales[:, None]).round_().clamp_(-top, top)
    values = _pack(levels.to(torch.int8), BITS[quantization])
    return Quantized(values, scales, (largest > RANGE).sum(), finite)


def dequantize(
    values: Tensor, scales: Tensor, quantization: str, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return standardized hidden states, (x - mean) / std.

    int8 is one fused multiplication: only bytes are copied to the device, and no wider copy of them is made
    there.

    Args:
        values: uint8 [N, bytes per token].
        scales: fp32 [N].
        quantization: a key of `BITS`.
        mean: the family's channel means, fp32 [W].
        std: the family's channel standard deviations, fp32 [W].
        dtype: type of the result.

    Returns:
        [N, W] on the device of `values`.
    """
    width = mean.shape[0]
    if quantization == "bf16":
        raw = values.contiguous().view(torch.bfloat16)  # [N, W]
        return ((raw.float() - mean) / std).to(dtype)

    levels = values.view(torch.int8) if quantization == "int8" else _unpack(values, BITS[quantization], width)
    # `out` sets the type of the product; int8 x fp32 alone would give fp32.
    output = torch.empty(levels.shape, dtype=dtype, device=values.device)
    return torch.mul(levels, scales[:, None], out=output)


def _pack(levels: Tensor, bits: int) -> Tensor:
    """Pack levels int8 [N, W] of few bits next to each other, lowest bits first: uint8 [N, bytes]."""
    if bits == 8:
        return levels.view(torch.uint8)

    # A word is the smallest whole number of bytes that holds whole levels: 2 levels of 4 bits, 4 of 6.
    count = 8 // math.gcd(bits, 8)
    size = count * bits // 8
    width = levels.shape[1]
    padded = torch.nn.functional.pad(levels, (0, -width % count)).int() & (2**bits - 1)
    shifts = torch.arange(count, device=levels.device, dtype=torch.int32) * bits
    words = (padded.unflatten(1, (-1, count)) << shifts).sum(2, dtype=torch.int32)  # [N, ceil(W / count)]

    byte_shifts = torch.arange(size, device=levels.device, dtype=torch.int32) * 8
    packed = (words[:, :, None] >> byte_shifts & 255).flatten(1).to(torch.uint8)
    return packed[:, : math.ceil(width * bits / 8)]


def _unpack(values: Tensor, bits: int, width: int) -> Tensor:
    """Unpack uint8 [N, bytes] to levels int8 [N, W], the inverse of `_pack`."""
    count = 8 // math.gcd(bits, 8)
    size = count * bits // 8
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size)).int()
    byte_shifts = torch.arange(size, device=values.device, dtype=torch.int32) * 8
    words = (padded.unflatten(1, (-1, size)) << byte_shifts).sum(2, dtype=torch.int32)  # [N, ceil(W / count)]

    shifts = torch.arange(count, device=values.device, dtype=torch.int32) * bits
    levels = (words[:, :, None] >> shifts & (2**bits - 1)).flatten(1)[:, :width]
    # The highest bit of a level is its sign.
    return (levels - ((levels >> (bits - 1)) << bits)).to(torch.int8)
