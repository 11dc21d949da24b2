"""A store in a local folder: the embedded default, and any POSIX file system that a cluster shares."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_prep.store.faults import StoreError, naming_full_disk

TEMPORARY = ".tmp-"
CHUNK = 1 << 20


class LocalFolder:
    """Objects are files below `root`. A file gets its name only when it is whole and on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        """Where the store lies, for messages."""
        return str(self.root)

    def local_path(self, key: str) -> Path | None:
        """The file of an object."""
        return self.root / key

    def read(self, key: str) -> bytes:
        """The object's bytes."""
        return (self.root / key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Some of the object's bytes; fewer only at its end."""
        with (self.root / key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """The object's bytes from `start` on, in chunks."""
        with (self.root / key).open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def size(self, key: str) -> int | None:
        """The object's bytes; None if absent."""
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object, over an older one if there is one."""
        with self._written(key, data) as (temporary, path):
            os.replace(temporary, path)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists; a hard link is the one step that is both atomic and refuses to replace."""
        with self._written(key, data) as (temporary, path):
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS may repeat a link whose answer was lost; then the name that "exists" is our own file.
                return os.path.samefile(temporary, path)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise StoreError(f"{path}: this file system has no hard links: put the store on another one") from error
                raise
        return True

    @contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[tuple[Path, Path]]:
        path = self.root / key
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        with naming_full_disk(path):
            try:
                with _create(temporary) as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, CHUNK)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary, path
            finally:
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def entries(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Keys that start with `prefix`, sorted, with the time of their last change; temporary files are among them."""
        folder = self.root / prefix.rpartition("/")[0]
        found = []
        for where, _, names in os.walk(folder):
            relative = os.path.relpath(where, self.root)
            for name in names:
                key = name if relative == "." else f"{relative}/{name}"
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):
                        found.append((key, os.stat(os.path.join(where, name)).st_mtime))
        yield from sorted(found)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below `prefix`, sorted."""
        folder = self.root / prefix
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that it leaves empty."""
        path = self.root / key
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return

    def check(self, create: bool) -> bool:
        """Whether the store is there; made if asked."""
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        return self.root.is_dir()

    def close(self) -> None:
        """Nothing is held open."""


def _create(path: Path) -> BinaryIO:
    """Open a new file, with its folders; another process may be removing a folder that it finds empty."""
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb")
    raise StoreError(f"{path}: the folder vanishes as often as it is made: another process removes it")


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
