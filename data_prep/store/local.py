"""A store in a local folder: the default, and any POSIX file system that a cluster shares."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_prep.store.entry import Entry
from data_prep.store.faults import StoreError, TooLargeError
from model.common.files import is_full_disk, naming_full_disk, sync_path

TEMPORARY = ".tmp-"
CHUNK = 1 << 20
MAX_CREATE_TRIES = 100


class LocalFolder:
    """Objects are files below `root`. A file gets its name only when it is complete and on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def uri(self) -> str:
        """Address of the folder, for messages."""
        return str(self.root)

    def local_path(self, key: str) -> Path | None:
        """Return the path of an object's file."""
        return self.root / key

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the object's bytes, if they are not too many."""
        # Not a `Path`, which takes as long to make as the file to read.
        path = f"{self.root}/{key}"
        with _naming(path):
            status = os.stat(path)
            # To read a pipe would wait forever.
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(f"{path}: not a regular file: remove it")
            if max_bytes is not None and status.st_size > max_bytes:
                raise TooLargeError(f"{path}: {status.st_size} bytes")
            with open(path, "rb", buffering=0) as file:
                return file.readall()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer only at the object's end."""
        with _naming(self.root / key), (self.root / key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """Yield the object's bytes from `start` on, in chunks."""
        with _naming(self.root / key), (self.root / key).open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes; None if it does not exist."""
        path = self.root / key
        with _naming(path):
            return path.stat().st_size if path.is_file() else None

    def version(self, key: str) -> str | None:
        """Return the object's size and time of change; None if it does not exist."""
        path = self.root / key
        with _naming(path):
            if not path.is_file():
                return None
            return _version(path.stat())

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object and replace an older one."""
        with self._written(key, data) as (temporary, path):
            try:
                os.replace(temporary, path)
            except FileNotFoundError as error:
                raise _collected(path) from error

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists.

        A hard link is the one step that is atomic and also refuses to replace a file.

        Raises:
            StoreError: if the file system has no hard links.
        """
        with self._written(key, data) as (temporary, path):
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS may repeat a link whose answer was lost; then the name that "exists" is our own file.
                return os.path.samefile(temporary, path)
            except FileNotFoundError as error:
                raise _collected(path) from error
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
                message = f"{path}: this file system has no hard links: put the store on another one"
                raise StoreError(message) from error
        return True

    @contextmanager
    def _written(self, key: str, data: bytes | Path) -> Iterator[tuple[Path, Path]]:
        """Write a temporary file to the disk, and yield it with the final path, for a rename or a link.

        Its name is hidden, so `gc` removes what a killed writer leaves.
        """
        # `atomic_path` does not fit: `put_new` links instead of renaming, and the folder may vanish.
        path = self.root / key
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")

        with naming_full_disk(path), _naming(path):
            try:
                with _create(temporary) as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, CHUNK)
                    else:
                        file.write(data)
                    # Content before name: a power cut must not leave an object that has its name but not all
                    # of its bytes.
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary, path
            finally:
                # After a rename it does not exist; after a link it is a second name of the object.
                temporary.unlink(missing_ok=True)

        # The name too: a commit that a reader has seen must survive a power cut.
        sync_path(path.parent)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose keys start with `prefix`, sorted; temporary files too."""
        entries: list[Entry] = []
        # A prefix may end inside a name, as in a bucket, so the walk begins at its last whole folder.
        start = prefix.rpartition("/")[0]
        with _naming(self.root / start):
            # By hand, since `os.walk` asks for the status of each folder, and there is one for each payload.
            folders = [start]
            while folders:
                relative = folders.pop()
                for found in self._scan(relative):
                    key = f"{relative}/{found.name}" if relative else found.name
                    if found.is_dir(follow_symlinks=False):
                        folders.append(key)
                    elif key.startswith(prefix):
                        # Another process may delete a file between the listing and the stat. A link that
                        # leads nowhere, or to itself, a pipe or a device is no object either.
                        with suppress(OSError):
                            status = found.stat()
                            if stat.S_ISREG(status.st_mode):
                                entries.append(Entry(key, status.st_mtime, status.st_size, _version(status)))
        # A walk has no order, but callers rely on that of a bucket's listing.
        yield from sorted(entries)

    def _scan(self, folder: str) -> list["os.DirEntry[str]"]:
        """Return what a folder holds: nothing if another process has removed it, or it was never there.

        Raises:
            OSError: if it cannot be read: left out, it would look like one without commits.
        """
        try:
            with os.scandir(f"{self.root}/{folder}") as found:
                return list(found)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below `prefix`, sorted."""
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        with _naming(folder):
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that it leaves empty."""
        path = self.root / key
        with _naming(path):
            path.unlink(missing_ok=True)

        # A bucket has no empty folders, so `folders` must not list any here. `rmdir` refuses a folder that
        # another task has written to meanwhile.
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or removed by another task

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects, one after another."""
        for key in keys:
            self.delete(key)

    def check(self, create: bool) -> bool:
        """True if the folder exists, after creating it if `create`."""
        if create:
            with _naming(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
        return self.root.is_dir()

    def now(self) -> float:
        """Return the time by the clock that gives files their times, a file server's for instance."""
        probe = self.root / f"{TEMPORARY}{secrets.token_hex(8)}"
        with naming_full_disk(probe), _naming(probe):
            try:
                probe.touch()
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def close(self) -> None:
        """Do nothing: no file stays open between calls."""


def _version(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, {status.st_mtime_ns}"


def _create(path: Path) -> BinaryIO:
    """Open a new file and create its folders, even while another process removes folders that it finds empty.

    Raises:
        StoreError: if the folder was removed `MAX_CREATE_TRIES` times in a row.
    """
    for _ in range(MAX_CREATE_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb")
    raise StoreError(
        f"{path}: the folder was removed repeatedly while writing to it; is another process deleting it?"
    )


def _collected(path: Path) -> StoreError:
    return StoreError(
        f"{path}: its temporary file was removed while it was written: give `gc` more --older-than-hours, "
        "and run again"
    )


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Turn refusals of the file system into errors that name `path`.

    Raises:
        FileNotFoundError: if there is no such object.
        StoreError: if it cannot be read or written; a full disk stays an `OSError`.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_full_disk(error):
            raise
        place = error.filename or path
        raise StoreError(
            f"{place}: {error.strerror}: correct its rights, or what is at that path, and run again"
        ) from error
