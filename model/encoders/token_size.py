"""Sizes of stored hidden states. Without torch, so that a command that only prints sizes starts at once."""

import math

BITS = {"int8": 8, "int6": 6, "int4": 4, "bf16": 16}


def bytes_per_token(quantization: str, width: int) -> int:
    """Return the bytes of one token's values, without its scale (4 bytes, none for bf16)."""
    return math.ceil(width * BITS[quantization] / 8)
