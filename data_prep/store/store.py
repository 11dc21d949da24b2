"""Where datasets live: objects under keys, in a bucket or in a local folder, behind one interface.

Two promises hold the commit protocol up: an object is there whole or not at all, and `put_new` lets one writer win. Everything
that may pass (throttling, resets, stalls, short or damaged bodies) is tried again for ten minutes (`LI_DIT_RETRY_SECONDS`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from data_prep.store.faults import DamagedError, StoreError, TransientError, retrying
from data_prep.store.local import CHUNK, LocalFolder
from data_prep.store.s3 import S3Bucket
from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk

__all__ = ["Store", "StoreError", "hash_file", "open_store"]


@dataclass(frozen=True)
class StoredFile:
    """A payload file as its commit names it."""

    key: str
    bytes: int
    xxh64: str


class Backend(Protocol):
    """What a kind of store has to do, on whole keys; faults that may pass are handled inside, except in `stream`."""

    @property
    def uri(self) -> str: ...
    def local_path(self, key: str) -> Path | None: ...
    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, start: int, length: int) -> bytes: ...
    def stream(self, key: str, start: int) -> Iterator[bytes]: ...
    def size(self, key: str) -> int | None: ...
    def put(self, key: str, data: bytes | Path) -> None: ...
    def put_new(self, key: str, data: bytes) -> bool: ...
    def entries(self, prefix: str) -> Iterator[tuple[str, float]]: ...
    def folders(self, prefix: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def check(self, create: bool) -> bool: ...
    def close(self) -> None: ...


class Store:
    """The objects below a prefix of a backend. Safe to share between threads, to pickle, and to use after a fork.

    Every method may raise `StoreError` (all retries failed) or `UserError` (no access, disk full); both name the object.
    """

    def __init__(self, backend: Backend, prefix: str = "") -> None:
        self._backend = backend
        self._prefix = prefix

    @property
    def uri(self) -> str:
        """Where the store lies: `s3://bucket/prefix` or a folder."""
        return f"{self._backend.uri}/{self._prefix}".rstrip("/")

    def sub(self, prefix: str) -> "Store":
        """The same store below a prefix."""
        return Store(self._backend, self._key(prefix) + "/")

    def local_path(self, key: str) -> Path | None:
        """The object's file, where the store is a local folder; whether or not it exists."""
        return self._backend.local_path(self._key(key))

    def read(self, key: str) -> bytes:
        """The object's bytes; for small objects.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self._backend.read(self._key(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Some of the object's bytes, fewer only at its end; not checked against a hash, so for sources that have none.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self._backend.read_range(self._key(key), start, length)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self._backend.size(self._key(key)) is not None

    def size(self, key: str) -> int:
        """The object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        size = self._backend.size(self._key(key))
        if size is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        return size

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with `prefix`, sorted."""
        return (key for key, _ in self.entries(prefix) if not key.rpartition("/")[2].startswith("."))

    def entries(self, prefix: str) -> Iterator[tuple[str, float]]:
        """As `list`, with the time of the last change (seconds since 1970), and with what killed writers left behind."""
        if prefix:
            _validated(prefix.rstrip("/"))
        for key, modified in self._backend.entries(self._prefix + prefix):
            yield key.removeprefix(self._prefix), modified

    def folders(self, prefix: str) -> Sequence[str]:
        """Names of the folders right below `prefix` (which ends with `/`), sorted; does not walk through them."""
        _validated(prefix.rstrip("/"))
        return self._backend.folders(self._prefix + prefix)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object atomically. It replaces what has the key: for keys that nobody else writes."""
        self._backend.put(self._visible(key), data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken; False = it was. The one step on which tasks may race."""
        return self._backend.put_new(self._visible(key), data)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._backend.delete(self._key(key))

    def fetch(self, file: StoredFile, path: Path) -> None:
        """Download a payload; `path` appears only when size and xxh64 are right.

        A broken connection is continued where it broke; a body with a wrong size or hash is fetched anew.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: it cannot be had, or is damaged where it lies; the message names the key.
        """
        key = self._key(file.key)
        with naming_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                download = _Download(self._backend, key, file, temporary)
                retrying(f"{self._backend.uri}/{key}")(download.go_on)

    def close(self) -> None:
        """Drop the connections; the next call opens new ones."""
        self._backend.close()

    def _key(self, key: str) -> str:
        return self._prefix + _validated(key)

    def _visible(self, key: str) -> str:
        """A key to write to; hidden names are for the backends' temporary files, and `list` leaves them out."""
        if any(name.startswith(".") for name in key.split("/")):
            raise UserError(
                f"key {key[:200]!r}: no name in it may start with a dot: rename what it is made from"
            )
        return self._key(key)


class _Download:
    """One download over any number of connections."""

    def __init__(self, backend: Backend, key: str, file: StoredFile, path: Path) -> None:
        self.backend, self.key, self.file, self.path = backend, key, file, path
        self.restart()

    def restart(self) -> None:
        self.done = 0
        self.hash = xxhash.xxh64()
        self.path.write_bytes(b"")

    def go_on(self) -> None:
        """Take up the download where it stopped, to its end."""
        try:
            self.append()
        except DamagedError:
            self.restart()
            raise

    def append(self) -> None:
        before = self.done
        with self.path.open("r+b") as target:
            target.seek(self.done)
            for chunk in self.backend.stream(self.key, self.done):
                target.write(chunk)
                self.hash.update(chunk)
                self.done += len(chunk)
        if before < self.done < self.file.bytes:
            raise TransientError(f"the body ended after {self.done} of {self.file.bytes} bytes")
        if self.done != self.file.bytes or self.hash.hexdigest() != self.file.xxh64:
            raise DamagedError("the body does not match its commit")


def open_store(uri: str, create: bool = False) -> Store:
    """Open `s3://bucket/prefix` or a local folder; `create` makes the folder (never a bucket).

    Raises:
        UserError: it does not exist, cannot be reached, or is of an unknown kind.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not bucket:
            raise UserError(f"{uri}: no bucket: write s3://bucket/prefix")
        store = Store(S3Bucket(bucket), _validated(prefix) + "/" if prefix else "")
    elif "://" in uri or not uri:
        raise UserError(f"store {uri!r}: neither s3://bucket/prefix nor a local folder")
    else:
        store = Store(LocalFolder(Path(uri).expanduser().absolute()))
    if not store._backend.check(create):
        raise UserError(
            f"store {uri}: does not exist: correct the address"
            + (", or make the bucket" if "://" in uri else "")
        )
    return store


def hash_file(path: Path) -> str:
    """xxh64 of a file, as `StoredFile` has it."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _validated(key: str) -> str:
    """The key, if it cannot lead out of the store.

    Raises:
        UserError: it could.
    """
    bad = any(name in ("", ".", "..") or len(name.encode(errors="replace")) > 255 for name in key.split("/"))
    if bad or "\\" in key or not key.isprintable():
        raise UserError(f"key {key[:200]!r}: not a plain relative path: rename what it is made from")
    return key
