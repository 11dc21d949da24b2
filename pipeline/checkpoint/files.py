"""Rank files: flat tensors in safetensors, hashed while they are written, and read by ranges."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

_CHUNK = 1 << 22
_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}
_TYPES |= {torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Written:
    """Size and hash of a file, as a manifest records them."""

    bytes: int
    xxh64: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write CPU tensors as one safetensors file and force it to disk.

    The safetensors library's writer keeps Python's global lock, so that training would stop, and cannot hash
    what it writes.

    Raises:
        OSError: if the disk is full, or the file cannot be written.
    """
    header, end = {}, 0
    # The format: the header's length in 8 bytes, a JSON header, and the tensors at the offsets that it gives.
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes

    digest = xxhash.xxh64()
    # Unbuffered, because the chunks are large already.
    with path.open("wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())):
            view = memoryview(block)
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                digest.update(chunk)
                while chunk:
                    # An unbuffered `write` may write less than it was given.
                    chunk = chunk[file.write(chunk) :]
        # The manifest, written later, vouches for these bytes: they must survive a crash of the machine.
        os.fsync(file.fileno())
    return Written(8 + len(text) + end, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    # Viewed as bytes, since numpy has no bf16.
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class RankFiles:
    """The rank files of one checkpoint, each opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[int, safe_open] = {}

    def read(self, rank: int, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flat tensor in a rank's file."""
        if rank not in self._open:
            self._open[rank] = safe_open(self.folder / rank_file(rank), framework="pt")
        # A slice reads only its own bytes from the mapped file.
        return self._open[rank].get_slice(name)[start:stop]


def rank_file(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.safetensors"
