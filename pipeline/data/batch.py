"""A batch as the trainer reads it, and as one block of memory on its way there.

All tensors of a batch lie in one block (shared memory in a loader process), so a batch crosses to the trainer as one file
descriptor and to the device as one copy; nothing is pickled but a few numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipeline.data.epoch_plan import sample_rng, sample_seed
from pipeline.text.texts import PackedText

_ALIGN = 64

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor of a block, in order."""


@dataclass
class Batch:
    """This rank's samples of one global batch, all of one bucket."""

    bucket: str
    epoch: int
    index: int
    """Number of the global batch in its epoch."""
    ids: Tensor
    """int64 [B]: sample ids."""
    sources: Tensor
    """int64 [B]: number of each sample's dataset, in the order of `data.datasets`; 0 where there is one."""
    passes: Tensor
    """int64 [B]: which pass over its dataset reads the sample; the epoch where there is one."""
    mean: Tensor
    """bf16 [B, C, h, w]: means of the latents' moments."""
    std: Tensor
    """bf16 [B, C, h, w]: their standard deviations."""
    posterior_noise: Tensor
    """fp32 [B, C, h, w]: normal numbers that draw the latents from their moments."""
    noise: Tensor
    """fp32 [B, C, h, w]: normal numbers for the objective."""
    u: Tensor
    """fp32 [B]: uniform numbers in [0, 1) that pick the timesteps."""
    texts: dict[str, PackedText] = field(default_factory=dict)
    """Text family -> captions; the same caption of a sample in each."""
    captions: list[str] | None = None
    """The captions themselves, empty = the null caption; only where the trainer encodes them (`fusion.encode: online`)."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return Batch(**moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: PackedText(*(_moved(part, device) for part in vars(text).values())) for name, text in value.items()}
    return value


@dataclass
class PackedBatch:
    """A batch as one block of memory."""

    bucket: str
    epoch: int
    index: int
    last: bool
    """Whether it is the last of its epoch."""
    memory: Tensor
    """uint8: all tensors one after another."""
    layout: Layout
    seeds: tuple[int, ...]
    """Of the noise, one a dataset."""
    counts: dict[str, list[int]]
    """Text family -> tokens of each caption."""
    captions: list[str] | None = None
    """As in `Batch`."""

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory, as the loader's pinning thread asks for it."""
        self.memory = self.memory.pin_memory()
        return self

    def unpack(self, device: torch.device) -> Batch:
        """Copy to the device at once, then cut into tensors without further copies, and draw the noise there."""
        here = tensors_in(self.memory, self.layout)
        tensors = tensors_in(self.memory.to(device, non_blocking=True), self.layout)
        keys = [
            (self.seeds[source], turn, id)
            for source, turn, id in zip(*(here[name].tolist() for name in ("sources", "passes", "ids")), strict=True)
        ]
        texts = {family: _packed_text(tensors, family, counts) for family, counts in self.counts.items()}
        if len(self.seeds) > 1:
            for text in texts.values():
                text.sources = tensors["sources"]
        noises = {name: draw_noise(device, tensors["mean"].shape, keys, name) for name in ("posterior_noise", "noise")}
        return Batch(self.bucket, self.epoch, self.index, **tensors, **noises, texts=texts, captions=self.captions)


def draw_noise(device: torch.device, shape: Sequence[int], keys: Sequence[tuple[int, int, int]], stream: str) -> Tensor:
    """Normal numbers fp32 [B, ...] drawn on a device, each sample's from its own generator, so whatever its batch is.

    Philox on the CPU and on a GPU, but with other numbers. The trainer draws them, not a loader process: that would take four
    times as long as reading the sample (latents of 512 pixels), and they would be more bytes to hand over than the latents.

    Args:
        device: where to draw.
        shape: of the result; one key for each of its first dimension.
        keys: (seed, epoch, sample id).
        stream: what the numbers are for.
    """
    numbers = torch.empty(tuple(shape), device=device)
    if device.type == "cpu":
        for row, key in zip(numbers.numpy(), keys, strict=True):
            sample_rng(*key, stream).standard_normal(dtype=np.float32, out=row)
        return numbers
    generator = torch.Generator(device)
    for row, key in zip(numbers, keys, strict=True):
        row.normal_(generator=generator.manual_seed(sample_seed(*key, stream)))
    return numbers


def _packed_text(tensors: dict[str, Tensor], family: str, counts: list[int]) -> PackedText:
    values, scales, lengths = (tensors.pop(f"{family}/{part}") for part in ("values", "scales", "lengths"))
    return PackedText(values, scales, lengths, counts)


def offsets(layout: Layout) -> list[int]:
    """Where each tensor of a block begins, and where the last one ends; aligned, so that any dtype can be viewed."""
    ends = [0]
    for _, dtype, shape in layout:
        size = dtype.itemsize * math.prod(shape)
        ends.append(ends[-1] + (size + _ALIGN - 1) // _ALIGN * _ALIGN)
    return ends


def tensors_in(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a block by name, without copies."""
    found = {}
    for (name, dtype, shape), start in zip(layout, offsets(layout)[:-1], strict=True):
        found[name] = memory[start : start + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
    return found


def allocate(layout: Layout) -> Tensor:
    """An uninitialised block; in shared memory in a loader process, so that handing it over does not copy it."""
    size = offsets(layout)[-1]
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
