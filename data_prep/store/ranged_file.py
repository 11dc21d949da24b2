"""A file that can be searched, over anything that is read in ranges."""

import io
from abc import ABC, abstractmethod


class RangedFile(io.RawIOBase, ABC):
    """Bytes of a known size as a file; each read is one range."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0

    @abstractmethod
    def read_at(self, position: int, length: int) -> bytes:
        """Return up to `length` bytes, at least one of them, from `position` on."""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move there, but not before the start, and return where that is."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, up to the end, and return the number of bytes read."""
        # S3 refuses a range that starts at the end, so none is requested there.
        length = min(len(buffer), max(0, self._size - self._position))
        data = self.read_at(self._position, length) if length else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
