"""Quantisation of LLM states for the store.

LLM states hold massive activations: a few channels are hundreds of times the rest, so a scale per token alone loses the
others (int8: 15 to 229 % error in the worst channel). Channels are therefore standardised first, with a mean and a spread
measured once per family, then each token gets one scale: below 1 % in every channel.
"""

import math

import torch
from torch import Tensor

BITS = {"int8": 8, "int6": 6, "int4": 4, "bf16": 16}
_CLIP = {"int8": (1.0,), "int6": (1.0, 0.9), "int4": (1.0, 0.9, 0.8, 0.7)}
"""Shares of a token's largest value tried as its range: at few bits, clipping a rare value makes the others finer."""


def BYTES_PER_TOKEN(quantisation: str, width: int) -> int:
    """Bytes that the values of one token take; its scale (4 bytes, none for bf16) comes on top."""
    return math.ceil(width * BITS[quantisation] / 8)


def quantise(states: Tensor, quantisation: str, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, int]:
    """Quantise raw states fp32 [N, W] with the family's channel `mean` and `spread` [W].

    Returns:
        Values uint8 [N, bytes per token], scales fp32 [N] (empty for bf16), and how many values were clipped.

    Raises:
        ValueError: a state is not finite.
    """
    if not torch.isfinite(states).all():
        raise ValueError("states are not finite")
    if quantisation == "bf16":
        return states.to(torch.bfloat16).contiguous().view(torch.uint8), states.new_empty(0), 0
    top = 2 ** (BITS[quantisation] - 1) - 1
    standard = (states.float() - mean) / spread  # [N, W]
    largest = standard.abs().amax(1).clamp(min=1e-12)  # [N]
    scales, best = largest / top, torch.full_like(largest, torch.inf)
    if len(_CLIP[quantisation]) > 1:
        for share in _CLIP[quantisation]:
            trial = largest * share / top
            error = (_round(standard, trial, top) * trial[:, None] - standard).square().sum(1)
            scales, best = torch.where(error < best, trial, scales), torch.minimum(error, best)
    levels = _round(standard, scales, top)
    clipped = int((standard.abs() > (scales * (top + 0.5))[:, None]).sum())
    return _pack(levels.to(torch.int8), BITS[quantisation]), scales, clipped


def dequantise(values: Tensor, scales: Tensor, quantisation: str, mean: Tensor, spread: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardised states [N, W] = (x - mean) / spread, in `dtype`, on the device of `values`.

    Values uint8 [N, bytes per token]; scales fp32 [N]. int8 is one fused multiplication: bytes are what crosses to the
    device, and no wider copy of them is made on the way.
    """
    width = mean.shape[0]
    if quantisation == "bf16":
        raw = values.contiguous().view(torch.bfloat16)  # [N, W]
        return ((raw.float() - mean) / spread).to(dtype)
    levels = values.view(torch.int8) if quantisation == "int8" else _unpack(values, BITS[quantisation], width)
    output = torch.empty(levels.shape, dtype=dtype, device=values.device)
    return torch.mul(levels, scales[:, None], out=output)


def _round(standard: Tensor, scales: Tensor, top: int) -> Tensor:
    return (standard / scales[:, None]).round_().clamp_(-top, top)


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
