"""Normal numbers of samples: each sample's own, whatever batch it is in.

On a CPU each sample has a numpy generator. On a GPU that would be two kernels for each sample. There the
numbers of all samples come from one function of a key and a counter, which is compiled to one kernel. That
function gives the same numbers on a CPU, where it takes several times as long.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.epoch_plan import sample_rng, sample_seed

SampleKey = tuple[int, int, int]
"""(seed, pass, sample id): all that a sample's random numbers depend on."""

ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def sample_noise(
    device: torch.device, shape: Sequence[int], keys: Sequence[SampleKey], stream: str
) -> Tensor:
    """Return normal numbers fp32 [B, ...], each sample's from its key alone.

    The trainer samples them, not a loader process: that would take four times as long as reading the sample
    (latents of 512 pixels), and the noise has more bytes than the latents.

    Args:
        device: where the numbers are made; a CPU's are others than a GPU's.
        shape: of the result; one key for each of its first dimension.
        keys: of the samples.
        stream: name of the numbers' purpose.
    """
    if device.type == "cpu":
        numbers = torch.empty(tuple(shape))
        for row, key in zip(numbers.numpy(), keys, strict=True):
            # Written in place through numpy, which shares the tensor's memory.
            sample_rng(*key, stream).standard_normal(dtype=np.float32, out=row)
        return numbers

    # Through page-locked memory, so that the host does not wait for the copy.
    seeds = seeds_of(keys, stream).pin_memory().to(device, non_blocking=True)
    return _compiled()(seeds, math.prod(shape[1:])).view(tuple(shape))


def seeds_of(keys: Sequence[SampleKey], stream: str) -> Tensor:
    """Return 64 bits for each sample, int64 [B]."""
    return torch.from_numpy(np.array([sample_seed(*key, stream) for key in keys], np.uint64).view(np.int64))


def normal_numbers(seeds: Tensor, count: int) -> Tensor:
    """Return normal numbers fp32 [B, count], each row a function of its seed.

    Counters 0, 1, ... are encrypted by Philox4x32-10 with the seed as the key (Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", SC 2011), and the words become normal numbers by Box and Muller.

    Args:
        seeds: int64 [B].
        count: numbers of each row.
    """
    blocks = torch.arange(-(-count // 4), device=seeds.device)  # a counter gives four words
    words = philox(blocks[None], torch.zeros_like(blocks)[None], seeds[:, None])

    # In (0, 1], so that the logarithm is finite; the smallest gives 6.7 standard deviations.
    uniform = [(word.float() + 0.5) * 2.0**-32 for word in words]
    pairs: list[Tensor] = []
    for radius, turn in (uniform[:2], uniform[2:]):
        length, angle = (-2.0 * radius.log()).sqrt(), 2.0 * math.pi * turn
        pairs += [length * angle.cos(), length * angle.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]  # [B, 4 blocks], cut


def philox(low: Tensor, high: Tensor, seeds: Tensor) -> list[Tensor]:
    """Return the four words of Philox4x32-10, each int64 in [0, 2^32), of shapes that broadcast.

    Args:
        low: the counter's lower two words, int64.
        high: the counter's upper two words, int64.
        seeds: the keys, int64.
    """
    words = [low & _WORD, (low >> 32) & _WORD, high & _WORD, (high >> 32) & _WORD]
    keys = [seeds & _WORD, (seeds >> 32) & _WORD]
    for _ in range(ROUNDS):
        # The product of two words has 64 bits: it wraps in int64, and both of its halves are right.
        first, second = (word * factor for word, factor in zip(words[::2], _MULTIPLIERS, strict=True))
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return words


@cache
def _compiled() -> Any:
    """Return `normal_numbers` as one kernel for all shapes."""
    return torch.compile(normal_numbers, dynamic=True)
