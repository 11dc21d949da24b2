"""Payload files on this machine: where they are, whether they are whole, and reading rows out of them.

A file of a local store is read in place. A file of a remote store is downloaded into a cache directory that all processes
of a machine share; it gets its name there only after size and hash were checked. Locks are `flock`s, so they end with the
process that held them, and nothing is kept in shared memory: a killed job leaves nothing that could block the next one. What
it leaves unfinished is told from a live job's by the lock: who is at work on a file holds it.
"""

import fcntl
import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash

from data_prep.store.store import Store, StoredFile, StoreError, hash_file
from model.common.errors import UserError
from model.common.files import naming_full_disk, write_atomic

log = logging.getLogger(__name__)

_STRIPES = 256
_TOUCH_SECONDS = 30.0
_SPARE_BYTES = 256 << 20
"""Disk space that the cache leaves free for others."""
_HEAD_BYTES = 4096


class Shard:
    """Rows of one MDS file, read by position: a short or damaged file is an exception, never wrong data."""

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        """Open a shard.

        Args:
            path: the MDS file.
            columns: name -> MDS encoding that it must have: `int` or `bytes`.

        Raises:
            FileNotFoundError: it is gone, for instance evicted.
            StoreError: it is not such a file.
        """
        self.path = path
        self.names = sorted(columns)
        self._variable = [columns[name] == "bytes" for name in self.names]
        self._sizes = struct.Struct(f"<{sum(self._variable)}I")
        self._touched = 0.0
        self._file = path.open("rb", buffering=0)
        try:
            (count,) = struct.unpack("<I", self._read(0, 4))
            self.offsets = np.frombuffer(self._read(4, 4 * (count + 1)), "<u4").astype(np.int64)
            header = json.loads(self._read(4 * (count + 2), int(self.offsets[0]) - 4 * (count + 2)))
            found = dict(zip(header["column_names"], header["column_encodings"], strict=True))
        except (struct.error, ValueError, IndexError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not an MDS shard: run `python -m data_prep verify`") from error
        if found != columns:
            raise StoreError(f"{path}: has columns {found}, not {columns}: run `python -m data_prep verify`")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _read(self, start: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, start)
        if len(data) != length:
            raise StoreError(f"{self.path}: ends too early: delete it, or run `python -m data_prep verify`")
        return data

    def row(self, index: int) -> "Row":
        """One row; only its beginning is read here."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        head = self._read(start, min(end - start, _HEAD_BYTES))
        sizes = iter(self._sizes.unpack_from(head))
        at = self._sizes.size
        columns = {}
        for name, variable in zip(self.names, self._variable, strict=True):
            size = next(sizes) if variable else 8
            columns[name] = at, size
            at += size
        if at != end - start:
            raise StoreError(f"{self.path}: row {index} is damaged: run `python -m data_prep verify`")
        return Row(self, start, head, columns)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `start` on, without a copy in between."""
        done = 0
        while done < len(target):
            got = os.preadv(self._file.fileno(), [target[done:]], start + done)
            if not got:
                raise StoreError(f"{self.path}: ends too early: delete it, or run `python -m data_prep verify`")
            done += got

    def announce(self, start: int, length: int) -> None:
        """Let the system read these bytes ahead, so that a batch's rows arrive in parallel."""
        os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def touch(self) -> None:
        """Note that the file is in use, so that others are evicted first."""
        self._touched = touch(self._file.fileno(), self._touched)


def touch(file: int | Path, last: float) -> float:
    """Note that a file of the cache is in use; at most every half minute.

    Args:
        file: descriptor or path.
        last: time of the last note, as this function gave it; 0 = none.

    Returns:
        The time of the last note now.

    Raises:
        FileNotFoundError: there is no such file.
    """
    status, now = os.stat(file), time.time()
    if now - last <= _TOUCH_SECONDS:
        return last
    os.utime(file, ns=(int(now * 1e9), status.st_mtime_ns))
    return now


class Row:
    """Where the columns of one row lie."""

    __slots__ = ("_columns", "_head", "_start", "shard")

    def __init__(self, shard: Shard, start: int, head: bytes, columns: dict[str, tuple[int, int]]) -> None:
        self.shard, self._start, self._head, self._columns = shard, start, head, columns

    def column(self, name: str) -> tuple[int, int]:
        """Position in the file and size of a column."""
        at, size = self._columns[name]
        return self._start + at, size

    def read(self, name: str) -> bytes:
        """A small column's bytes."""
        at, size = self._columns[name]
        if at + size <= len(self._head):
            return self._head[at : at + size]
        return self.shard._read(self._start + at, size)

    @property
    def id(self) -> int:
        """The sample's id."""
        (value,) = struct.unpack("<q", self.read("id"))
        return value


@contextmanager
def locked(path: Path, wait_seconds: float) -> Iterator[bool]:
    """Hold an exclusive lock; gives False if it could not be had in time. The lock ends with the process at the latest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.05)
            else:
                try:
                    yield True
                finally:
                    fcntl.flock(file, fcntl.LOCK_UN)  # and not by closing: a process forked meanwhile has the file open too
                return


class ShardCache:
    """Gives the path of a payload file that is on this machine and whole. For all processes of a machine at once."""

    def __init__(self, dataset: Store, root: Path, snapshot: str, limit: int | None) -> None:
        """Set up the cache.

        Args:
            dataset: the dataset's store.
            root: directory of caches; those of other snapshots lie beside this one's, and are evicted first by age.
            snapshot: the snapshot's id.
            limit: bytes that all caches under `root` may take; None = what the disk has.

        Raises:
            UserError: the directory cannot be written.
        """
        self.dataset, self.root, self.limit = dataset, root, limit
        self.folder = root / snapshot
        self._whole: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (root / ".writable").open("ab"):
                pass
        except OSError as error:
            raise UserError(f"data.cache={root}: {error.strerror}: name a directory that can be written") from error

    @property
    def is_local(self) -> bool:
        """Whether the store is a local folder, read in place."""
        return self.dataset.local_path("any") is not None

    def get(self, file: StoredFile, name: str, wait_seconds: float) -> Path | None:
        """The file's path, once it is there and whole.

        Args:
            file: the payload as the snapshot names it.
            name: name in the cache, `family/bucket/00012`.
            wait_seconds: how long to wait for another process that is fetching it.

        Returns:
            The path; None when another process was not done in time.

        Raises:
            StoreError: it cannot be had or is damaged; the message names it.
            UserError: the disk is full.
        """
        place = self.dataset.local_path(file.key)
        path = place or self.folder / f"{name}.mds"
        if name in self._whole and path.exists():
            return path
        begun = time.time()
        with naming_full_disk(path), self.locked(name, wait_seconds) as held:
            if not held:
                return None
            if not self._is_whole(path, file, name):
                if place is not None:
                    state = "is damaged" if place.exists() else "is missing"
                    raise StoreError(f"{path}: {state}: run `python -m data_prep verify` for a way out")
                self._raise_failure(name, begun)
                self._download(path, file, name)
        self._whole.add(name)
        return path

    def locked(self, name: str, wait_seconds: float) -> AbstractContextManager[bool]:
        """Hold the lock of a file of this cache, as `locked` does; a few files share each lock."""
        return self._locked(self.folder / name, wait_seconds)

    def _locked(self, place: Path, wait_seconds: float) -> AbstractContextManager[bool]:
        return locked(self.root / "locks" / f"{xxhash.xxh64_intdigest(str(place)) % _STRIPES:03d}", wait_seconds)

    def _download(self, path: Path, file: StoredFile, name: str) -> None:
        path.unlink(missing_ok=True)
        with self._room(path, file.bytes):
            try:
                self.dataset.fetch(file, path)
            except FileNotFoundError as error:
                self._tell_failure(name, f"{self.dataset.uri}/{file.key}: is missing: run `python -m data_prep verify`", error)
            except StoreError as error:
                self._tell_failure(name, str(error), error)
        self._failure(name).unlink(missing_ok=True)
        self._mark(path, name)

    def _tell_failure(self, name: str, why: str, cause: Exception) -> NoReturn:
        """Fail, and so that who waits for the file in another process or thread fails with it, not after ten minutes more."""
        failure = self._failure(name)
        with suppress(OSError):  # a full disk hides no other error
            write_atomic(failure, json.dumps([time.time(), why]))  # a file's own time may be milliseconds behind
        raise StoreError(why) from cause

    def _raise_failure(self, name: str, since: float) -> None:
        """Fail if another has failed to fetch the file since then."""
        with suppress(FileNotFoundError):
            when, why = json.loads(self._failure(name).read_text())
            if when >= since:
                raise StoreError(why)

    def _failure(self, name: str) -> Path:
        return self.folder / f"{name}.failed"

    def _is_whole(self, path: Path, file: StoredFile, name: str) -> bool:
        """Whether the file is there with the right size and hash; hashed once per state of the file and boot of the machine."""
        try:
            if path.stat().st_size != file.bytes:
                return False
            if self._marker(name).exists() and self._marker(name).read_text() == _state(path):
                return True
            if hash_file(path) != file.xxh64:
                return False
        except FileNotFoundError:
            return False
        self._mark(path, name)
        return True

    def _marker(self, name: str) -> Path:
        return self.folder / f"{name}.whole"

    def _mark(self, path: Path, name: str) -> None:
        marker = self._marker(name)
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(marker, _state(path))

    @contextmanager
    def _room(self, path: Path, needed: int) -> Iterator[None]:
        """Evict what was used longest ago until `needed` more bytes fit, and keep them reserved. Who has an evicted file open
        can go on reading it."""
        reservation = path.with_name(f"{path.name}.reserved")
        with locked(self.root / "locks" / "evict", 600.0) as held:
            if not held:
                raise StoreError(f"{self.root / 'locks' / 'evict'}: held for ten minutes: end the process that hangs")
            files = _files(self.root, ".mds")
            others = (place for place, _ in _files(self.root, ".reserved") if place != reservation)
            coming = needed + sum(map(self._reserved, others))
            used = sum(status.st_size for _, status in files)
            free = shutil.disk_usage(self.root).free
            # What is evicted must satisfy both the limit that was set and the disk.
            surplus = max(used + coming - self.limit if self.limit is not None else 0, coming + _SPARE_BYTES - free)
            for place, status in sorted(files, key=lambda item: item[1].st_atime_ns):
                if surplus > 0:
                    place.unlink(missing_ok=True)
                    surplus -= status.st_size
            reservation.parent.mkdir(parents=True, exist_ok=True)
            file = reservation.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(str(needed))
            file.flush()
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)
            file.close()

    @staticmethod
    def _reserved(reservation: Path) -> int:
        """Bytes that a download in progress may still take; none if its process, which locks the reservation, is gone."""
        with suppress(FileNotFoundError), reservation.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
        return 0

    def clean(self) -> None:
        """Remove what processes that are gone left unfinished, in the caches of all snapshots; never a living one's."""
        for path, _ in _files(self.root, ".part", ".reserved"):
            with self._locked(path.with_name(path.name.partition(".")[0]), 0.0) as left_behind:  # nobody is at work on it
                if left_behind:
                    path.unlink(missing_ok=True)


def _files(root: Path, *suffixes: str) -> list[tuple[Path, os.stat_result]]:
    """Files of all caches under `root`."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(suffixes):
                with suppress(FileNotFoundError):  # removed by another process meanwhile
                    found.append((Path(folder, name), os.stat(os.path.join(folder, name))))
    return found


def _state(path: Path) -> str:
    """What changes when a file's content may have: after a crash of the machine, content may be lost without a trace."""
    status = path.stat()
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text().strip() if boot.exists() else ""
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ino} {booted}"
