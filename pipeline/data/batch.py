"""A batch as the trainer reads it, and as one block of memory on its way there.

All tensors of a batch are in one block (shared memory in a loader process), so a batch crosses to the trainer
as one file descriptor and to the device as one copy; only a few numbers are pickled.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipeline.data.noise import SampleKey, sample_noise
from pipeline.text.texts import PackedText

_ALIGN = 64
"""Bytes; tensors of a block are aligned, so that any dtype can be viewed."""

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor of a block, in order."""


@dataclass
class Batch:
    """This rank's samples of one global batch, all of one bucket.

    Latents are [B, C, ...]: those of images are [B, C, h, w].
    """

    bucket: str
    epoch: int
    index: int
    """Number of the global batch in its epoch."""
    ids: Tensor
    """int64 [B]: sample ids."""
    sources: Tensor
    """int64 [B]: number of each sample's dataset, in the order of `data.datasets`; 0 if there is only one."""
    passes: Tensor
    """int64 [B]: number of the pass over its dataset that reads the sample; of one dataset, the epoch."""
    mean: Tensor
    """bf16 [B, C, ...]: means of the latents' moments."""
    std: Tensor
    """bf16 [B, C, ...]: their standard deviations."""
    posterior_noise: Tensor
    """fp32 [B, C, ...]: normal numbers that sample the latents from their moments."""
    noise: Tensor
    """fp32 [B, C, ...]: normal numbers for the objective."""
    u: Tensor
    """fp32 [B]: uniform numbers in [0, 1) that pick the timesteps."""
    keys: list[SampleKey] = field(default_factory=list)
    """Key of each sample's random numbers."""
    texts: dict[str, PackedText] = field(default_factory=dict)
    """Text family -> captions; the same caption of a sample in each."""
    captions: list[str] | None = None
    """The captions themselves, empty = the null caption; only for `fusion.encode: online`."""
    users: Tensor | None = None
    """int64 [B]: number of each sample's user, -1 = none; only for a stage with users."""

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Return further normal numbers fp32 [B, *shape] of the samples.

        Args:
            stream: name of the numbers' purpose; another name gives other numbers.
            shape: of one sample's numbers.
        """
        # The keys decide the numbers, so an objective that asks for more of them does not shift those of the
        # others, and a resumed run gets the same ones.
        return sample_noise(self.u.device, (len(self.keys), *shape), self.keys, stream)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, those of the texts too."""
        for holder in (self, *self.texts.values()):
            yield from (value for value in vars(holder).values() if isinstance(value, Tensor))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return Batch(**moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # Without waiting for the copy: the kernels that use the result are queued behind it on the same
        # stream.
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(text, device) for name, text in value.items()}
    # `counts` is a list of host numbers and falls through to the last line: shapes must not wait for the
    # device.
    if isinstance(value, PackedText):
        return PackedText(*(_moved(part, device) for part in vars(value).values()))
    return value


@dataclass
class PackedBatch:
    """A batch as one block of memory."""

    bucket: str
    epoch: int
    index: int
    last: bool
    """True if it is the last of its epoch."""
    memory: Tensor
    """uint8: all tensors one after another."""
    layout: Layout
    seeds: tuple[int, ...]
    """Seeds of the noise, one per dataset."""
    counts: dict[str, list[int]]
    """Text family -> tokens of each caption."""
    captions: list[str] | None = None
    """As in `Batch`."""

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in page-locked memory; the loader's pinning thread calls this."""
        # One block means one pinned allocation per batch, and a copy that can overlap with computing.
        self.memory = self.memory.pin_memory()
        return self

    def unpack(self, device: torch.device) -> Batch:
        """Copy the block to the device at once, cut it into tensors there, and sample the noise."""
        # The keys come from the block on the host: reading them from the device would wait for the copy.
        on_host = tensors_in(self.memory, self.layout)
        keys = sample_keys(self.seeds, *(on_host[name].tolist() for name in ("sources", "passes", "ids")))
        tensors = tensors_in(self.memory.to(device, non_blocking=True), self.layout)

        texts = {family: _packed_text(tensors, family, counts) for family, counts in self.counts.items()}
        for text in texts.values():
            text.sources = tensors["sources"]

        shape = tensors["mean"].shape
        # Two streams: the same numbers in both would make the noise depend on the clean latents.
        posterior_noise, noise = (
            sample_noise(device, shape, keys, stream) for stream in ("posterior_noise", "noise")
        )
        return Batch(
            bucket=self.bucket,
            epoch=self.epoch,
            index=self.index,
            ids=tensors["ids"],
            sources=tensors["sources"],
            passes=tensors["passes"],
            mean=tensors["mean"],
            std=tensors["std"],
            posterior_noise=posterior_noise,
            noise=noise,
            u=tensors["u"],
            keys=keys,
            texts=texts,
            captions=self.captions,
            users=tensors.get("users"),
        )


def sample_keys(
    seeds: Sequence[int], sources: Sequence[int], passes: Sequence[int], ids: Sequence[int]
) -> list[SampleKey]:
    """Return the key of each sample of a batch.

    Args:
        seeds: one per dataset.
        sources: number of each sample's dataset.
        passes: number of the pass that reads it.
        ids: its id.
    """
    return [(seeds[source], number, id) for source, number, id in zip(sources, passes, ids, strict=True)]


def _packed_text(tensors: dict[str, Tensor], family: str, counts: list[int]) -> PackedText:
    # Popped, so that what remains in `tensors` are the batch's own fields.
    values, scales, lengths = (tensors.pop(f"{family}/{part}") for part in ("values", "scales", "lengths"))
    return PackedText(values, scales, lengths, counts)


def _offsets(layout: Layout) -> list[int]:
    """Return the beginning of each tensor of a block, and the end of the last one."""
    ends = [0]
    for _, dtype, shape in layout:
        size = dtype.itemsize * math.prod(shape)
        # Rounded up to a multiple of `_ALIGN`.
        ends.append(ends[-1] + (size + _ALIGN - 1) // _ALIGN * _ALIGN)
    return ends


def tensors_in(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of a block by name, without copies."""
    tensors = {}
    for (name, dtype, shape), start in zip(layout, _offsets(layout)[:-1], strict=True):
        tensors[name] = memory[start : start + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
    return tensors


def allocate(layout: Layout) -> Tensor:
    """Return an uninitialized block.

    In a loader process it is shared memory, which is handed over without a copy.
    """
    size = _offsets(layout)[-1]
    # In the trainer's own process (`data.workers: 0`) nothing is handed over: plain memory is enough.
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # Memory allocated as shared is filled in place; torch's queue would copy any other tensor into shared
    # memory.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
