"""Files of a source, local or in a bucket: list them, read them whole, in ranges or as seekable files."""

import fnmatch
import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from data_prep.sources.sample import Place
from data_prep.store.store import Store, open_store
from model.common.errors import UserError

BUFFER = 8 << 20
"""Bytes of one ranged read: large enough to hide the latency of object storage."""
READERS = 8
"""Concurrent reads from a bucket."""
GLOB = re.compile(r"[*?\[]")


class SourceFiles:
    """The files that a source's path names. `path` is a file, a folder or a glob, local or `s3://`."""

    def __init__(self, path: str, suffixes: tuple[str, ...] = ()) -> None:
        self._path = path
        self._suffixes = suffixes
        root, self._pattern = _split_glob(path)

        # A single file is a pattern that matches its own name.
        if not self._pattern and path.endswith(suffixes) and suffixes:
            root, _, self._pattern = path.rpartition("/")
        self._store: Store = open_store(root or ".")

    def names(self) -> list[str]:
        """Return all matching names below the root, sorted.

        Raises:
            UserError: if there are none.
        """
        names = [name for name in self._store.list("") if self._matches(name)]
        if not names:
            wanted = f" with suffix {' or '.join(self._suffixes)}" if self._suffixes else ""
            raise UserError(f"{self._path}: no files{wanted} there: check `sources.path`")
        return names

    def _matches(self, name: str) -> bool:
        # Hidden files are no data: system files, caches, unfinished downloads.
        if any(part.startswith(".") for part in name.split("/")):
            return False

        if self._pattern:
            # Unlike a shell's, this `*` also matches `/`, so a pattern reaches into folders below.
            return fnmatch.fnmatchcase(name, self._pattern)
        return not self._suffixes or name.lower().endswith(self._suffixes)

    def usable(self, name: str) -> bool:
        """True if a file name can be used as a key; stores refuse control characters and the like."""
        if not name.isprintable() or "\\" in name:
            return False
        return all(0 < len(part.encode()) <= 255 for part in name.split("/"))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        return self._store.size(name)

    def exists(self, name: str) -> bool:
        """True if the file exists."""
        return self._store.exists(name)

    def read(self, name: str) -> bytes:
        """Return the whole file."""
        return self._store.read(name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer at the end of the file."""
        return self._store.read_range(name, start, length)

    def fetch(
        self, places: Sequence[Place], read: Callable[[Place], bytes]
    ) -> Iterator[tuple[int, bytes | None]]:
        """Read images at `places`, several at once if they come over a network.

        Args:
            places: positions of the images.
            read: returns the bytes at one place.

        Yields:
            Index of the place, and its bytes; None if the file no longer exists.
        """

        def get(place: Place) -> bytes | None:
            try:
                return read(place)
            except (FileNotFoundError, IsADirectoryError):
                return None

        # Any key does: only a local folder has paths.
        is_local = self._store.local_path("x") is not None
        if is_local:
            yield from enumerate(map(get, places))
            return

        with ThreadPoolExecutor(READERS) as pool:
            yield from enumerate(pool.map(get, places))

    def open(self, name: str) -> BinaryIO:
        """Open a file for sequential or random reading, without loading it into memory."""
        local = self._store.local_path(name)
        if local is not None:
            return local.open("rb")
        # The buffer turns a reader's many small reads into a few large requests.
        return io.BufferedReader(_RangedFile(self, name), BUFFER)

    def resolve(self, path: str) -> str | None:
        """Return the name, relative to the root, of the file that a row's `path` means.

        Args:
            path: relative to the root, or absolute.

        Returns:
            The name; None if the path leads out of the source, also through a symbolic link.
        """
        # Rows are foreign: an unchecked path could read any file of this machine into the dataset.
        root = self._store.uri
        path = path.removeprefix(f"{root.rstrip('/')}/")
        parts = path.split("/")
        name = "/".join(part for part in parts if part not in ("", "."))
        if path.startswith("/") or "://" in path or ".." in parts or not self.usable(name):
            return None

        # A symbolic link below the root may lead out of it.
        local = self._store.local_path(name)
        if local is not None and not local.resolve().is_relative_to(Path(root).resolve()):
            return None
        return name


class _RangedFile(io.RawIOBase):
    """A seekable view of an object, one ranged read at a time."""

    def __init__(self, files: SourceFiles, name: str) -> None:
        self._files = files
        self._name = name
        self._size = files.size(name)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        # S3 refuses a range that starts at the end, so none is requested there.
        length = min(len(buffer), max(0, self._size - self._position))
        data = self._files.read_range(self._name, self._position, length) if length else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _split_glob(path: str) -> tuple[str, str]:
    """Split a path into a root without wildcards, and the pattern below it (empty if none)."""
    match = GLOB.search(path)
    if not match:
        return path, ""

    # The root ends with the last whole folder before the first wildcard.
    root, _, _ = path[: match.start()].rpartition("/")
    if not root:
        return ("/" if path.startswith("/") else "."), path.lstrip("/")
    return root, path[len(root) + 1 :]
