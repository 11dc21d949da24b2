"""Storage for datasets: objects under keys, in a bucket or in a local folder, behind one interface.

The commit protocol rests on two promises: an object exists completely or not at all, and `put_new` lets only
one writer win. Transient faults (throttling, resets, stalls, short or damaged bodies) are retried for ten
minutes (`LI_DIT_RETRY_SECONDS`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import xxhash

from data_prep.store.entry import Entry
from data_prep.store.faults import DamagedError, StoreError, TransientError, retrying
from data_prep.store.hub import SCHEME, open_hub
from data_prep.store.local import CHUNK, LocalFolder
from data_prep.store.s3 import S3Bucket
from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk
from model.common.records import STRICT, Count, Hash

__all__ = ["Store", "StoreError", "hash_file", "open_store"]

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A payload file as its commit records it."""

    __pydantic_config__ = STRICT

    key: str
    bytes: Count
    xxh64: Hash


class Backend(Protocol):
    """Kind of store, addressed by complete keys; retries transient faults itself, except in `stream`."""

    @property
    def uri(self) -> str: ...
    def local_path(self, key: str) -> Path | None: ...
    def read(self, key: str, max_bytes: int | None = None) -> bytes: ...
    def read_range(self, key: str, start: int, length: int) -> bytes: ...
    def stream(self, key: str, start: int) -> Iterator[bytes]: ...
    def size(self, key: str) -> int | None: ...
    def version(self, key: str) -> str | None: ...
    def put(self, key: str, data: bytes | Path) -> None: ...
    def put_new(self, key: str, data: bytes) -> bool: ...
    def entries(self, prefix: str) -> Iterator[Entry]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_many(self, keys: Sequence[str]) -> None: ...
    def check(self, create: bool) -> bool: ...
    def now(self) -> float: ...
    def close(self) -> None: ...


class Store:
    """Objects below a prefix of a backend. Safe to share between threads, to pickle, and to use after a fork.

    Every method may raise `StoreError` (all retries failed) or `UserError` (no access, disk full); both name
    the object.
    """

    def __init__(self, backend: Backend, prefix: str = "") -> None:
        self._backend = backend
        self._prefix = prefix

    @property
    def uri(self) -> str:
        """Address of the store: `s3://bucket/prefix` or a folder."""
        return f"{self._backend.uri}/{self._prefix}".rstrip("/")

    def sub(self, prefix: str) -> "Store":
        """Return the same store below a prefix."""
        return Store(self._backend, self._key(prefix) + "/")

    def local_path(self, key: str) -> Path | None:
        """Return the path of an object, which may not exist; None if the store is not a local folder."""
        return self._backend.local_path(self._key(key))

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the bytes of a small object.

        Raises:
            FileNotFoundError: if there is no such object.
            TooLargeError: if it is larger than `max_bytes`; nothing of it is read then.
        """
        return self._backend.read(self._key(key), max_bytes)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer only at the object's end.

        They are not checked against a hash, so this is for raw sources, which have none.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        return self._backend.read_range(self._key(key), start, length)

    def exists(self, key: str) -> bool:
        """True if there is such an object."""
        return self._backend.size(self._key(key)) is not None

    def size(self, key: str) -> int:
        """Return the object's size in bytes.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        return self._existing(key, self._backend.size(self._key(key)))

    def version(self, key: str) -> str:
        """Return a text that is another one after an object that others write has changed.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        return self._existing(key, self._backend.version(self._key(key)))

    def _existing(self, key: str, found: Found | None) -> Found:
        if found is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return found

    def list(self, prefix: str) -> Iterator[str]:
        """Yield keys that start with `prefix`, sorted, without temporary files."""
        for entry in self.listing(prefix):
            yield entry.key

    def listing(self, prefix: str, hidden: bool = False) -> Iterator[Entry]:
        """Yield the objects whose keys start with `prefix`, sorted.

        Args:
            prefix: start of the keys.
            hidden: with temporary files of killed writers, and whatever else has a hidden name.
        """
        # An empty prefix lists everything.
        if prefix:
            _validated(prefix.rstrip("/"))
        for entry in self._backend.entries(self._prefix + prefix):
            # Temporary files and probes have hidden names, and no other object has (`_visible`).
            if hidden or not entry.key.rpartition("/")[2].startswith("."):
                yield Entry(entry.key.removeprefix(self._prefix), entry.modified, entry.bytes, entry.version)

    def entries(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Yield (key, modification time in seconds since 1970), with temporary files of killed writers."""
        for entry in self.listing(prefix, hidden=True):
            yield entry.key, entry.modified

    def now(self) -> float:
        """Return the time by the clock of `entries`, which may not be that of this machine."""
        return self._backend.now()

    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders directly below `prefix` (which ends with `/`), sorted."""
        _validated(prefix.rstrip("/"))
        return self._backend.folders(self._prefix + prefix)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object atomically, replacing an older one; for keys that no other task writes."""
        self._backend.put(self._visible(key), data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken. This is the one step in which tasks may race.

        Returns:
            True if this call wrote the object, False if it existed.
        """
        return self._backend.put_new(self._visible(key), data)

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        self._backend.delete(self._key(key))

    def delete_many(self, keys: Iterable[str]) -> None:
        """Remove objects, those of them that exist; a bucket's by 1,000 per request."""
        self._backend.delete_many([self._key(key) for key in keys])

    def fetch(self, file: StoredFile, path: Path) -> None:
        """Download a payload; `path` appears only after size and xxh64 have been checked.

        After a broken connection the download resumes at the same byte; a body with a wrong size or hash is
        downloaded again from the start.

        Args:
            file: the payload, as its commit records it.
            path: the local file to create; its folders are created too.

        Raises:
            FileNotFoundError: if there is no such object.
            StoreError: if it cannot be downloaded, or is damaged in the store; the message names the key.
        """
        key = self._key(file.key)
        with naming_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                download = _Download(self._backend, key, file, temporary)
                retrying(f"{self._backend.uri}/{key}")(download.resume)

    def close(self) -> None:
        """Drop the connections; the next call opens new ones."""
        self._backend.close()

    def _key(self, key: str) -> str:
        return self._prefix + _validated(key)

    def _visible(self, key: str) -> str:
        """Return the full key to write to; hidden names are reserved for the backends' temporary files."""
        if any(name.startswith(".") for name in key.split("/")):
            raise UserError(
                f"key {key[:200]!r}: no name in it may start with a dot: rename the dataset, family or bucket"
            )
        return self._key(key)


class _Download:
    """One download, over any number of connections."""

    def __init__(self, backend: Backend, key: str, file: StoredFile, path: Path) -> None:
        self.backend = backend
        self.key = key
        self.file = file
        self.path = path
        self.restart()

    def restart(self) -> None:
        """Throw away what was downloaded."""
        self.done = 0
        self.hash = xxhash.xxh64()
        self.path.write_bytes(b"")

    def resume(self) -> None:
        """Continue from the last byte to the end.

        Raises:
            TransientError: if the connection broke; the next call resumes there.
            DamagedError: if size or hash are wrong; the next call starts over.
        """
        try:
            self._append()
        except DamagedError:
            self.restart()
            raise

    def _append(self) -> None:
        before = self.done
        # Opened without truncation, at the last byte that was counted. The hash is computed on the way, since
        # a second pass would read a large file from the disk again.
        with self.path.open("r+b") as target:
            target.seek(self.done)
            for chunk in self.backend.stream(self.key, self.done):
                target.write(chunk)
                self.hash.update(chunk)
                self.done += len(chunk)

        # No progress means that the object itself is too short, so another try from here cannot help.
        if before < self.done < self.file.bytes:
            raise TransientError(f"the body ended after {self.done} of {self.file.bytes} bytes")
        if self.done != self.file.bytes or self.hash.hexdigest() != self.file.xxh64:
            raise DamagedError("the body does not match its commit")


def open_store(uri: str, create: bool = False) -> Store:
    """Open a store.

    Args:
        uri: `s3://bucket/prefix`, `hf://OWNER/NAME@COMMIT/path` (only for reading), or a local folder.
        create: create the folder if it does not exist; a bucket is never created.

    Returns:
        The store; keys are relative to the URI.

    Raises:
        UserError: if the store does not exist, cannot be reached, or is of an unknown kind.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not bucket:
            raise UserError(f"{uri}: no bucket: write s3://bucket/prefix")

        store = Store(S3Bucket(bucket), _validated(prefix) + "/" if prefix else "")
    elif uri.startswith(SCHEME):
        hub, folder = open_hub(uri)
        store = Store(hub, _validated(folder) + "/" if folder else "")
    elif "://" in uri or not uri:
        raise UserError(f"store {uri!r}: neither s3://bucket/prefix nor a local folder")
    else:
        # Absolute, because a store may be pickled for a process with another working directory.
        store = Store(LocalFolder(Path(uri).expanduser().absolute()))

    # Checked at once, so that a wrong address fails before the work and not at its first write.
    if not store._backend.check(create):
        advice = "correct the address" + (", or create the bucket" if "://" in uri else "")
        # a run's stage may name its store relative to the folder in which it was started
        begins = "" if "://" in uri or Path(uri).expanduser().is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"store {uri}: does not exist{begins}: {advice}")
    return store


def hash_file(path: Path) -> str:
    """Return the xxh64 of a file, as `StoredFile.xxh64` holds it."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_plain_key(key: str) -> bool:
    """True if a key is a relative path of printable names, as all are that we write."""
    names = key.split("/")
    # The rules of a local folder, also for buckets, so that a dataset can be copied to either. 255 bytes is
    # the longest file name on Linux.
    bad = any(name in ("", ".", "..") or len(name.encode(errors="replace")) > 255 for name in names)
    return not bad and "\\" not in key and key.isprintable()


def _validated(key: str) -> str:
    """Return the key.

    Raises:
        UserError: if it could lead out of the store.
    """
    if not is_plain_key(key):
        raise UserError(
            f"key {key[:200]!r}: not a plain relative path: rename the dataset, family or file behind it"
        )
    return key
