"""Quantisation of LLM states for the store.

LLM states hold massive activations: a few channels are hundreds of times the rest, so a scale per token alone loses the
others (int8: 15 to 229 % error in the worst channel). Channels are therefore standardised first, with a mean and a spread
measured once per family, then each token gets one scale: below 1 % in every channel.
"""

import math

import torch
from torch import Tensor

RANGE = 8.0
"""Spreads within which the values of a usual token lie; the largest of a token is 3 to 5 in most."""
BITS = {"int8": 8, "int6": 6, "int4": 4, "bf16": 16}


def bytes_per_token(quantisation: str, width: int) -> int:
    """Bytes that the values of one token take; its scale (4 bytes, none for bf16) comes on top."""
    return math.ceil(width * BITS[quantisation] / 8)


def quantize(states: Tensor, quantisation: str, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, int]:
    """Quantise raw states fp32 [N, W] with the family's channel `mean` and `std` [W].

    Returns:
        Values uint8 [N, bytes per token]; scales fp32 [N] (empty for bf16); and how many tokens a fixed range of `RANGE`
        spreads would have clipped. None is, since a token's scale follows its largest value: these are only coarser than usual.

    Raises:
        ValueError: a state is not finite.
    """
    if not torch.isfinite(states).all():
        raise ValueError("states are not finite")
    if quantisation == "bf16":
        return states.to(torch.bfloat16).contiguous().view(torch.uint8), states.new_empty(0), 0
    top = 2 ** (BITS[quantisation] - 1) - 1
    standard = (states.float() - mean) / std  # [N, W]
    # The range of a token is its largest value. Cutting it at less makes the mean error of int4 smaller (13 to 12 %) but that of
    # the worst channel larger (14 to 28 % on Gemma), since it is always the same channels that are cut.
    largest = standard.abs().amax(1).clamp(min=1e-12)  # [N]
    scales = largest / top
    levels = (standard / scales[:, None]).round_().clamp_(-top, top)
    return _pack(levels.to(torch.int8), BITS[quantisation]), scales, int((largest > RANGE).sum())


def dequantize(values: Tensor, scales: Tensor, quantisation: str, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardised states [N, W] = (x - mean) / spread, in `dtype`, on the device of `values`.

    Values uint8 [N, bytes per token]; scales fp32 [N]. int8 is one fused multiplication: bytes are what crosses to the
    device, and no wider copy of them is made on the way.
    """
    width = mean.shape[0]
    if quantisation == "bf16":
        raw = values.contiguous().view(torch.bfloat16)  # [N, W]
        return ((raw.float() - mean) / std).to(dtype)
    levels = values.view(torch.int8) if quantisation == "int8" else _unpack(values, BITS[quantisation], width)
    output = torch.empty(levels.shape, dtype=dtype, device=values.device)
    return torch.mul(levels, scales[:, None], out=output)


def _pack(levels: Tensor, bits: int) -> Tensor:
    """int8 [N, W] -> uint8 [N, bytes]: levels of few bits side by side, lowest bits first."""
    if bits == 8:
        return levels.view(torch.uint8)
    count = 8 // math.gcd(bits, 8)  # levels in a whole number of bytes: 2 of 4 bits, 4 of 6
    size = count * bits // 8
    width = levels.shape[1]
    padded = torch.nn.functional.pad(levels, (0, -width % count)).int() & (2**bits - 1)
    shifts = torch.arange(count, device=levels.device, dtype=torch.int32) * bits
    words = (padded.unflatten(1, (-1, count)) << shifts).sum(2, dtype=torch.int32)  # [N, ceil(W / count)]
    byte_shifts = torch.arange(size, device=levels.device, dtype=torch.int32) * 8
    packed = (words[:, :, None] >> byte_shifts & 255).flatten(1).to(torch.uint8)
    return packed[:, : math.ceil(width * bits / 8)]


def _unpack(values: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [N, bytes] -> int8 [N, W], the inverse of `_pack`."""
    count = 8 // math.gcd(bits, 8)
    size = count * bits // 8
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size)).int()
    byte_shifts = torch.arange(size, device=values.device, dtype=torch.int32) * 8
    words = (padded.unflatten(1, (-1, size)) << byte_shifts).sum(2, dtype=torch.int32)
    shifts = torch.arange(count, device=values.device, dtype=torch.int32) * bits
    levels = (words[:, :, None] >> shifts & (2**bits - 1)).flatten(1)[:, :width]
    return (levels - ((levels >> (bits - 1)) << bits)).to(torch.int8)
