"""A batch as the trainer reads it, and as one block of memory on its way there.

All tensors of a batch lie in one block (shared memory in a loader process), so a batch crosses to the trainer as one file
descriptor and to the device as one copy; nothing is pickled but a few numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipeline.batches import sample_seed
from pipeline.texts import PackedText

_ALIGN = 64

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor of a block, in order."""

NOISES = ("posterior_noise", "noise")
"""Tensors of normal numbers; also the names of their random streams."""


@dataclass
class Batch:
    """This rank's samples of one global batch, all of one bucket."""

    bucket: str
    epoch: int
    index: int
    """Number of the global batch in its epoch."""
    ids: Tensor
    """int64 [B]: sample ids."""
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
    seed: int
    """Of the noise."""
    counts: dict[str, list[int]]
    """Text family -> tokens of each caption."""
    captions: list[str] | None = None
    """As in `Batch`."""

    def pin_memory(self) -> "PackedBatch":
        """The same in page-locked memory, as the loader's pinning thread asks for it."""
        self.memory = self.memory.pin_memory()
        return self

    def unpack(self, device: torch.device) -> Batch:
        """Copy to the device at once, then cut into tensors without further copies; draw there the noise that is lacking."""
        ids = tensors_in(self.memory, self.layout)["ids"].tolist()
        tensors = tensors_in(self.memory.to(device, non_blocking=True), self.layout)
        texts = {family: _packed_text(tensors, family, counts) for family, counts in self.counts.items()}
        for name in NOISES:
            if name not in tensors:
                tensors[name] = draw_on(device, tensors["mean"].shape, self.seed, self.epoch, ids, name)
        return Batch(self.bucket, self.epoch, self.index, **tensors, texts=texts, captions=self.captions)


def draw_on(device: torch.device, shape: Sequence[int], seed: int, epoch: int, ids: Sequence[int], stream: str) -> Tensor:
    """Normal numbers fp32 [B, ...] drawn on a device, each sample's from its own generator, so whatever its batch is.

    A GPU's generator is Philox too. It gives other numbers than a CPU's.
    """
    numbers = torch.empty(tuple(shape), device=device)
    generator = torch.Generator(device)
    for row, id in zip(numbers, ids, strict=True):
        row.normal_(generator=generator.manual_seed(sample_seed(seed, epoch, id, stream)))
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
