"""Payload files on this machine: find or download a file, check it, and evict what was used longest ago.

A file of a local store is read in place. A file of a remote store is downloaded into a cache directory that
all processes of a machine share; it gets its name there only after size and hash were checked. Locks are
`flock`s, so they end with the process that holds them, and nothing is kept in shared memory: a killed job
leaves nothing that could block the next one. The lock also shows whether an unfinished file belongs to a live
job: a process that works on a file holds the file's lock.

Bit rot: a file is hashed before its first use since the machine was booted, or since its size or time
changed. Disks also lose bits without a change of either, so of all times that a process asks for a file,
every `RECHECK_EVERY`-th hashes it again, which is at most 1/64 of what it opens.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import xxhash

from data_prep.dataset.mds import Shard
from data_prep.store.store import Store, StoredFile, StoreError, hash_file
from model.common.errors import UserError
from model.common.files import naming_full_disk, write_atomic
from model.common.records import checked, read_bounded

LOCKS = 256
"""Lock files per machine; a few files of the cache share each one."""
WAIT_SECONDS = 3600.0
"""Seconds that a process waits for another one which downloads the file."""
RECHECK_EVERY = 64
"""A process hashes a file again, whatever it knows about it, once in so many times that it asks for one."""
_MAX_OPEN_TRIES = 10
_TOUCH_SECONDS = 30.0
_SPARE_BYTES = 256 << 20
"""Disk space that the cache leaves free for others."""


class CachedShard(Shard):
    """A shard in a cache, or in a local store."""

    def __init__(self, path: Path, columns: dict[str, str], is_local: bool) -> None:
        super().__init__(path, columns)
        self._is_local = is_local
        self._touched = 0.0

    def touch(self) -> None:
        """Record that the file is in use, so that others are evicted first; every half minute at most."""
        now = time.time()
        # The files of a store may belong to another user, who alone may set their times.
        if self._is_local or now - self._touched <= _TOUCH_SECONDS:
            return
        # By hand, because many systems mount disks with `noatime` or `relatime`; the modification time stays,
        # since the mark of a checked file depends on it.
        os.utime(self.fileno(), ns=(int(now * 1e9), os.stat(self.fileno()).st_mtime_ns))
        self._touched = now


@contextmanager
def locked(path: Path, wait_seconds: float) -> Iterator[bool]:
    """Hold an exclusive lock, at the longest until this process ends.

    Args:
        path: the lock file.
        wait_seconds: how long to wait for another process that holds the lock.

    Yields:
        True, or False if the lock was not free in time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with path.open("ab") as file:
        while True:
            try:
                # Without blocking and in a loop, because `flock` has no time limit.
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
                    # Closing the file would not be enough: a process that was forked meanwhile has it open
                    # too.
                    fcntl.flock(file, fcntl.LOCK_UN)
                return


class ShardCache:
    """Payload files that are on this machine and whole; all processes of a machine share it."""

    def __init__(self, dataset: Store, root: Path, snapshot: str, limit: int | None) -> None:
        """Set up the cache.

        Args:
            dataset: the dataset's store.
            root: directory of caches; those of other snapshots are next to this one's, and evicted first by
                age.
            snapshot: the snapshot's id.
            limit: bytes that all caches under `root` may take; None = as many as fit on the disk.

        Raises:
            UserError: if the directory cannot be written.
        """
        self.dataset, self.root, self.limit = dataset, root, limit
        self.folder = root / snapshot
        self._whole: set[str] = set()
        self._asked = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # `mkdir` succeeds on a folder that exists, even if nothing can be written there.
            with (root / ".writable").open("ab"):
                pass
        except OSError as error:
            raise UserError(
                f"data.cache={root}: {error.strerror}: name a directory that can be written"
            ) from error

    @property
    def is_local(self) -> bool:
        """True if the store is a local folder, which is read in place."""
        return self.dataset.local_path("any") is not None

    def open(self, file: StoredFile, name: str, columns: dict[str, str]) -> CachedShard:
        """Open a shard, once its file is on this machine and whole.

        Args:
            file: the shard as the snapshot names it.
            name: name in the cache, `family/bucket/00012`.
            columns: name -> MDS encoding that the shard must have.

        Raises:
            StoreError: if the file cannot be fetched, is damaged, or is evicted again and again; the message
                names it.
            UserError: if the disk is full.
        """
        for _ in range(_MAX_OPEN_TRIES):
            path = self.get(file, name, WAIT_SECONDS)
            if path is None:
                raise StoreError(
                    f"{file.key}: another process has been fetching it for an hour: end that process"
                )
            with suppress(FileNotFoundError):  # evicted between the two steps
                return CachedShard(path, columns, self.is_local)
        raise StoreError(f"{file.key}: evicted as soon as it is fetched: raise data.cache_limit_gb")

    def get(self, file: StoredFile, name: str, wait_seconds: float) -> Path | None:
        """Return the path of a file, once the file is on this machine and whole.

        Args:
            file: the payload as the snapshot names it.
            name: name in the cache, `family/bucket/00012`.
            wait_seconds: how long to wait for another process that is fetching it.

        Returns:
            The path; None if another process was not done in time.

        Raises:
            StoreError: if the file cannot be fetched or is damaged; the message names it.
            UserError: if the disk is full.
        """
        stored = self.dataset.local_path(file.key)
        path = stored or self.folder / f"{name}.mds"
        # The usual case takes no lock: this process has checked the file before.
        is_due = self._is_due()
        if name in self._whole and path.exists() and not is_due:
            return path

        # A failure that is older than this call does not count: the caller may have mended the cause.
        begun = time.time()
        # The cache is what is written, also if the store is a local folder that is read in place.
        with naming_full_disk(self.folder), self.locked(name, wait_seconds) as is_held:
            if not is_held:
                return None
            # Tested again under the lock: the process that held it has probably fetched the file.
            if not self._is_whole(path, file, name, is_due):
                if stored is not None:
                    state = "is damaged" if stored.exists() else "is missing"
                    raise StoreError(f"{path}: {state}: run `python -m data_prep verify` for a way out")
                self._raise_failure(name, begun)
                self._download(path, file, name)
        self._whole.add(name)
        return path

    def _is_due(self) -> bool:
        """True if it is time to hash a file again; the turn differs between processes."""
        self._asked += 1
        return (os.getpid() + self._asked) % RECHECK_EVERY == 0

    def locked(self, name: str, wait_seconds: float) -> AbstractContextManager[bool]:
        """Hold the lock of a file of this cache, as `locked` does; a few files share each lock."""
        return self._locked(self.folder / name, wait_seconds)

    def _locked(self, path: Path, wait_seconds: float) -> AbstractContextManager[bool]:
        return locked(self.root / "locks" / f"{xxhash.xxh64_intdigest(str(path)) % LOCKS:03d}", wait_seconds)

    def _download(self, path: Path, file: StoredFile, name: str) -> None:
        # A damaged file frees its space before the new one reserves some.
        path.unlink(missing_ok=True)
        with self.reserve(path, file.bytes):
            try:
                self.dataset.fetch(file, path)
            except FileNotFoundError as error:
                message = f"{self.dataset.uri}/{file.key}: is missing: run `python -m data_prep verify`"
                self._record_failure(name, message, error)
            except StoreError as error:
                self._record_failure(name, str(error), error)
        # That failure is over: a process that has waited since before it must not raise it.
        self._failure_path(name).unlink(missing_ok=True)
        self._mark_whole(path, name)

    def _record_failure(self, name: str, message: str, cause: Exception) -> NoReturn:
        """Raise, and record the failure, so that processes and threads that wait for the file fail at once.

        Otherwise each of them would try for ten minutes more.
        """
        with suppress(OSError):  # a full disk must not hide the error itself
            # The time is written into the file, because a file's own time may be milliseconds behind the
            # clock.
            write_atomic(self._failure_path(name), json.dumps([time.time(), message]))
        raise StoreError(message) from cause

    def _raise_failure(self, name: str, since: float) -> None:
        """Raise if another process or thread has failed to fetch the file since then."""
        try:
            time_of_failure, message = checked(tuple[float, str], read_bounded(self._failure_path(name)))
        except (FileNotFoundError, ValueError):  # a damaged note says nothing
            return
        if time_of_failure >= since:
            raise StoreError(message)

    def _failure_path(self, name: str) -> Path:
        return self.folder / f"{name}.failed"

    def _is_whole(self, path: Path, file: StoredFile, name: str, again: bool) -> bool:
        """True if the file has the right size and hash.

        It is hashed once per state of the file and boot of the machine, and if `again`.
        """
        marker = self._marker_path(name)
        try:
            # From cheap to expensive: size, then the mark of an earlier check, and the hash last.
            if path.stat().st_size != file.bytes:
                return False
            if not again and marker.exists() and marker.read_bytes() == _state(path).encode():
                return True
            if hash_file(path) != file.xxh64:
                return False
        except FileNotFoundError:
            return False
        self._mark_whole(path, name)
        return True

    def _marker_path(self, name: str) -> Path:
        return self.folder / f"{name}.whole"

    def _mark_whole(self, path: Path, name: str) -> None:
        marker = self._marker_path(name)
        marker.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has evicted it already: it is fetched again
            write_atomic(marker, _state(path))

    @contextmanager
    def reserve(self, path: Path, needed: int) -> Iterator[None]:
        """Evict what was used longest ago until `needed` more bytes fit; the block keeps them reserved.

        A process that has an evicted file open can go on reading it.

        Args:
            path: the file that is about to be written.
            needed: its bytes.

        Raises:
            StoreError: if another process has been evicting for ten minutes.
        """
        # The reservation is itself locked by its process, so that of a killed one counts as nothing.
        reservation = path.with_name(f"{path.name}.reserved")
        lock = self.root / "locks" / "evict"
        with locked(lock, 600.0) as is_held:
            if not is_held:
                raise StoreError(f"{lock}: locked for ten minutes: end the process that hangs")
            self._evict(needed, reservation)

            reservation.parent.mkdir(parents=True, exist_ok=True)
            file = reservation.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(str(needed))
            # Flushed while the eviction lock is held: the next process must see the number.
            file.flush()
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)
            file.close()

    def _evict(self, needed: int, reservation: Path) -> None:
        # Downloads in progress count in full, although a part of their bytes is on the disk already: better
        # too much than a full disk. They are read before the files, so that one that ends between the two
        # counts twice and not as nothing; none begins, since the caller holds the lock.
        others = (path for path, _ in _files_under(self.root, ".reserved") if path != reservation)
        coming = needed + sum(map(_reserved_bytes, others))
        files = _files_under(self.root, ".mds")
        used = sum(status.st_size for _, status in files)

        # Both the limit that was set and the disk must suffice.
        over_limit = 0 if self.limit is None else used + coming - self.limit
        surplus = max(over_limit, coming + _SPARE_BYTES - shutil.disk_usage(self.root).free)
        # By access time, which `touch` keeps current.
        for path, status in sorted(files, key=lambda item: item[1].st_atime_ns):
            if surplus <= 0:
                break
            path.unlink(missing_ok=True)
            surplus -= status.st_size

    def clean(self) -> None:
        """Remove what dead processes left unfinished, in the caches of all snapshots.

        The files of living processes stay.
        """
        for path, _ in _files_under(self.root, ".part", ".reserved"):
            with self._locked(
                path.with_name(path.name.partition(".")[0]), 0.0
            ) as is_left_behind:  # no process works on it
                if is_left_behind:
                    path.unlink(missing_ok=True)


def _reserved_bytes(reservation: Path) -> int:
    """Bytes that a download in progress may still take; 0 if the process that locked them has exited."""
    with suppress(FileNotFoundError), reservation.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
            return int(text) if text.isdecimal() else 0
    return 0


def _files_under(root: Path, *suffixes: str) -> list[tuple[Path, os.stat_result]]:
    """Files of all caches under `root`."""
    files = []
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(suffixes):
                with suppress(FileNotFoundError):  # another process may have removed it
                    files.append((Path(folder, name), os.stat(os.path.join(folder, name))))
    return files


def _state(path: Path) -> str:
    """Return a text that changes when a file's content may have changed.

    It names the boot, since content may be lost without a trace when the machine crashes.
    """
    status = path.stat()
    boot = Path("/proc/sys/kernel/random/boot_id")
    # Systems without /proc, such as macOS, do without the boot's id.
    booted = boot.read_text().strip() if boot.exists() else ""
    return f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ino} {booted}"
