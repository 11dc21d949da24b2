"""Videos that are too large for memory: read in ranges where they are, as files that can be searched."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import xxhash

from data_prep.store.ranged_file import RangedFile

MAX_VIDEO_BYTES = 1 << 36
"""64 GB: larger videos are left out before anything of them is read."""
HEAD_BYTES = 1 << 12
"""Bytes from the start by which a file's kind is known."""
HASH_BLOCKS = 64
HASH_BLOCK_BYTES = 1 << 16
BUFFER_BYTES = 4 << 20
"""Bytes of one read, which packets are taken from one after another."""


@dataclass(frozen=True)
class LargeFile:
    """A video in a file of its own, or inside a tar; it can be pickled, and nothing of it is kept."""

    size: int
    head: bytes
    """Its first bytes."""
    opens: Callable[[], BinaryIO]
    """Opens the file that it is in, as one that can be searched, and reads no more than it is asked for."""
    offset: int = 0
    """Its first byte there."""

    @classmethod
    def of(cls, opens: Callable[[], BinaryIO], size: int, offset: int = 0) -> "LargeFile":
        """Return the file of `size` bytes from `offset` on, and read its first bytes."""
        with LargeFile(size, b"", opens, offset).open(HEAD_BYTES) as file:
            return cls(size, file.read(HEAD_BYTES), opens, offset)

    def __len__(self) -> int:
        return self.size

    def open(self, buffer: int = BUFFER_BYTES) -> BinaryIO:
        """Open it for reading from its first byte on, `buffer` bytes at a time."""
        return io.BufferedReader(_Window(self.opens(), self.offset, self.size), buffer)

    def hash(self) -> int:
        """Return a hash of its size and of 64 KB at 64 places, the first and the last bytes among them.

        That of all bytes would read the file twice.
        """
        digest = xxhash.xxh3_64(self.size.to_bytes(8, "little"))

        last = max(0, self.size - HASH_BLOCK_BYTES)
        with self.open(HASH_BLOCK_BYTES) as file:
            for block in range(HASH_BLOCKS):
                file.seek(last * block // (HASH_BLOCKS - 1))
                digest.update(file.read(HASH_BLOCK_BYTES))

        return digest.intdigest()


Media = bytes | LargeFile
"""An image, an animation or a video: in memory, or to be read in ranges."""


def media_hash(media: Media) -> int:
    """Return the hash by which equal files are found, and changed ones."""
    return xxhash.xxh3_64_intdigest(media) if isinstance(media, bytes) else media.hash()


class _Window(RangedFile):
    """A range of a file as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__(size)
        self._file, self._offset = file, offset

    def read_at(self, position: int, length: int) -> bytes:
        self._file.seek(self._offset + position)
        return self._file.read(length)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
