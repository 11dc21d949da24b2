"""Files of a source, local or in a bucket: list them, read them whole, in ranges or as seekable files.

A source is foreign. Only regular files inside it are read: no pipe, no device, nothing that a link outside of
it leads to. A file's size is known before its content is read, and a name that no store accepts is refused.
"""

import errno
import fnmatch
import functools
import io
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_prep.images.images import MAX_FILE_BYTES
from data_prep.sources.ranges import near_runs, span_of
from data_prep.sources.sample import (
    NO_ACCESS,
    NOT_REGULAR,
    OUTSIDE,
    TOO_LARGE,
    UNUSABLE,
    VIDEO_SUFFIXES,
    Inventory,
    Place,
    RefusedError,
)
from data_prep.store.faults import TooLargeError
from data_prep.store.ranged_file import RangedFile
from data_prep.store.store import Store, open_store
from model.common.errors import UserError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

BUFFER = 8 << 20
"""Bytes of one ranged read: large enough to hide the latency of object storage."""
READERS = 8
"""Concurrent reads from a bucket."""
READ_AHEAD = 32
"""Images that a scan reads from a bucket at once, each with a request of its own."""
GLOB = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{[^{}/]*(\.\.|,)[^{}/]*\}")
"""Lists and ranges such as `{00000..00099}`: shells expand them, sources read them as part of a name."""

COMPRESSED = (".gz", ".tgz", ".zst", ".zstd", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".rar")
"""Suffixes of files in which an image has no place of its own, so that they are not read."""

HIDDEN = "hidden"
LINKED_FOLDER = "linked folder"
BROKEN_LINK = "broken link"
OUTSIDE_LINK = "link out of the source"
SPECIAL = "not a regular file"
LOCKED = "no permission"
LOCKED_FOLDER = "folder without permission"
DEEP_FOLDER = "folder with too long a path"
BAD_NAME = "unusable file name"


class SourceFiles:
    """The files that a source's path names. `path` is a file, a folder or a glob, local or `s3://`."""

    def __init__(self, path: str, suffixes: tuple[str, ...] = ()) -> None:
        """Open the path's root; nothing is listed yet.

        Raises:
            UserError: if it does not exist, or is a file of another suffix.
        """
        self._path = path
        self._suffixes = suffixes
        root, self._pattern = _split_glob(path)

        # A single file is a pattern that matches its own name.
        if not self._pattern and path.endswith(suffixes) and suffixes:
            root, _, self._pattern = path.rpartition("/")
        elif Path(root).expanduser().is_file():
            wanted = f"not a {' or '.join(suffixes)} file" if suffixes else "a file, not a folder"
            if path.endswith(COMPRESSED):
                raise UserError(f"{path}: a compressed file, {wanted}: decompress it")
            raise UserError(f"{path}: {wanted}: correct `sources.path` or `sources.kind`")
        try:
            self._store: Store = open_store(root or ".")
        except UserError as error:
            if BRACES.search(root):
                raise UserError(f"{path}: does not exist: {_without_braces(path)}") from error
            raise
        self._versions: dict[str, str] = {}
        """Versions of the files of a bucket, from the listing until they are asked for."""
        self._inside: str | None = None
        """The last file that was found to be inside."""
        # Any key does: only a local folder has paths.
        self._is_local = self._store.local_path("x") is not None

    def inventory(self) -> tuple[list[str], Inventory]:
        """Return the names of all files that can be read, sorted, and an account of those that cannot."""
        names, inventory = self._listed
        return names, Inventory(inventory.found, {}, inventory.ignored.copy())

    def names_below(self, folder: str) -> list[str]:
        """Return those of the names of `inventory` that are below a folder, sorted; others are not listed."""
        names, _ = self._list(f"{folder}/")
        return names

    def one_by_one(self) -> Inventory:
        """Return the account of a source in which each file is a unit.

        Raises:
            UserError: if there are none.
        """
        names, inventory = self.inventory()
        for name in names:
            if not self._pattern and not name.lower().endswith(self._suffixes):
                inventory.ignore([name])
            elif self.usable(name):
                inventory.units[name] = 1
            else:
                inventory.ignored[BAD_NAME] += 1

        if not inventory.units:
            raise self.nothing_there(" or ".join(self._suffixes), inventory)
        return inventory

    def nothing_there(self, wanted: str, inventory: Inventory) -> UserError:
        """Return the error of a source without a file that it can read."""
        ignored = ", ".join(f"{count:,} {kind}" for kind, count in inventory.ignored.most_common(4))
        there = f" (there are: {ignored})" if ignored else ""
        way_out = "check `sources.path`"
        if any(kind.endswith(COMPRESSED) for kind in inventory.ignored):
            way_out = f"decompress them, or {way_out}"
        videos = [kind for kind in inventory.ignored if kind.removeprefix(".") in VIDEO_SUFFIXES]
        if videos and videos[0] not in wanted:
            way_out = f"set `clips` to read videos, or {way_out}"
        if BRACES.search(self._path):
            way_out = _without_braces(self._path)
        return UserError(f"{self._path}: no files with suffix {wanted} there{there}: {way_out}")

    @functools.cached_property
    def _listed(self) -> tuple[list[str], Inventory]:
        """All files in the path's reach. Listed once: a listing takes minutes if there are millions."""
        return self._list("")

    def _list(self, prefix: str) -> tuple[list[str], Inventory]:
        """List the files whose names start with `prefix`, which is empty or ends with a slash."""
        names: list[str] = []
        inventory = Inventory()
        for name, problem in self._walk(prefix):
            # Unlike a shell's, this `*` also matches `/`, so a pattern reaches into folders below.
            if self._pattern and not fnmatch.fnmatchcase(name, self._pattern):
                continue

            inventory.found += 1
            # Hidden files are no data: system files, caches, unfinished downloads.
            if any(part.startswith(".") for part in name.split("/")):
                problem = HIDDEN
            if problem:
                inventory.ignored[problem] += 1
            else:
                names.append(name)
        return sorted(names), inventory

    def _walk(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the name of each file that starts with `prefix`, and why it cannot be read (mostly empty)."""
        if self._is_local:
            yield from _walk_folder(Path(self._store.uri), prefix)
            return
        for entry in self._store.listing(prefix, hidden=True):
            # An object whose key ends with a slash is how some programs write a folder.
            if not entry.key.endswith("/"):
                # Of units only: a folder of images may have millions of files.
                if self._suffixes and entry.key.endswith(self._suffixes):
                    self._versions[entry.key] = f"{entry.bytes} bytes, {entry.version}"
                yield entry.key, ""

    def usable(self, name: str) -> bool:
        """True if a file name can be used as a key; stores refuse control characters and the like."""
        if not name.isprintable() or "\\" in name:
            return False
        return all(part not in (".", "..") and 0 < len(part.encode()) <= 255 for part in name.split("/"))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        return self._store.size(name)

    def version(self, name: str) -> str:
        """Return a text that is another one after the file has changed; empty if the file cannot be read."""
        try:
            # Right after the listing, which has the same text as the request for one file.
            if name in self._versions:
                return self._versions.pop(name)
            return self._store.version(name) if self.usable(name) else ""
        except FileNotFoundError:
            return ""

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Return the whole file.

        Raises:
            FileNotFoundError, IsADirectoryError: if there is no such file.
            RefusedError: if it is not read: it is too large, no regular file, or out of the source.
        """
        if not self._is_local:
            try:
                return self._store.read(self._checked(name), max_bytes)
            except TooLargeError as error:
                raise RefusedError(TOO_LARGE, str(error)[-200:]) from error

        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise RefusedError(TOO_LARGE, f"{name}: {size} bytes"[-200:])
            # Not more than announced, whatever is appended meanwhile.
            return file.read(size)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on; fewer at the end of the file."""
        if not self._is_local:
            return self._store.read_range(self._checked(name), start, length)
        with self.open(name) as file:
            file.seek(start)
            return file.read(length)

    def fetch(
        self, places: Sequence[Place], read: Callable[[Place], Loaded]
    ) -> Iterator[tuple[int, Loaded | None]]:
        """Read images at `places`, several at once if they come over a network.

        Args:
            places: positions of the images.
            read: returns what is at one place: bytes, or a large video.

        Yields:
            Index of the place, and what was read; None if the file no longer exists, or is refused.
        """

        def get(place: Place) -> Loaded | None:
            try:
                return read(place)
            except (FileNotFoundError, IsADirectoryError, RefusedError):
                return None

        if self._is_local:
            yield from enumerate(map(get, places))
            return

        with ThreadPoolExecutor(READERS) as pool:
            yield from enumerate(pool.map(get, places))

    def fetch_ranges(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Read images inside a file, at the offsets and lengths of `places`; see `fetch`.

        Over a network, images with small gaps between them come with one request.
        """
        if self._is_local:
            yield from self.fetch(places, lambda place: self.read_range(name, place.offset, place.length))
            return

        runs = list(near_runs(places))
        spans = [span_of(places, run) for run in runs]
        for number, data in self.fetch(spans, lambda span: self.read_range(name, span.offset, span.length)):
            for index in runs[number]:
                start = places[index].offset - spans[number].offset
                yield index, None if data is None else data[start : start + places[index].length]

    def read_ahead(self, items: Iterable[Item], load: Callable[[Item], Loaded]) -> Iterator[Loaded]:
        """Yield `load` of each item in order; in a bucket, of many at once, to hide the latency of requests.

        Args:
            items: the items; after an error of theirs, those before it are yielded first.
            load: reads what an item names.
        """
        if self._is_local:
            yield from map(load, items)
            return

        waiting: deque[Future[Loaded]] = deque()
        rest, failure = iter(items), None
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            while failure is None:
                try:
                    item = next(rest)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                    continue
                waiting.append(pool.submit(load, item))
                if len(waiting) >= READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def open(self, name: str, buffer: int = BUFFER) -> BinaryIO:
        """Open a file for sequential or random reading, without loading it into memory.

        Args:
            name: the file.
            buffer: bytes that a bucket is asked for at once; 0 = as many as the caller wants.

        Raises:
            FileNotFoundError, IsADirectoryError: if there is no such file.
            RefusedError: if it is not read: it is no regular file, or out of the source.
        """
        path = self._store.local_path(self._checked(name))
        if path is not None:
            # The images of a tar are read from it one after another: its path is looked at once.
            if name != self._inside and not self._is_inside(path):
                raise RefusedError(OUTSIDE, name[:200])
            self._inside = name
            return _open_regular(path)
        # The buffer turns a reader's many small reads into a few large requests.
        ranged: Any = _RangedSource(self, name)
        return io.BufferedReader(ranged, buffer) if buffer else ranged

    def _checked(self, name: str) -> str:
        if name != self._inside and not self.usable(name):
            raise RefusedError(UNUSABLE, name[:200])
        return name

    def _is_inside(self, path: Path) -> bool:
        """True if a path stays in the source, also through symbolic links."""
        return _real(path).is_relative_to(self._real_root)

    @functools.cached_property
    def _real_root(self) -> Path:
        return _real(Path(self._store.uri))

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
        if local is not None and not self._is_inside(local):
            return None
        return name


class _RangedSource(RangedFile):
    """A seekable view of an object, one ranged read at a time."""

    def __init__(self, files: SourceFiles, name: str) -> None:
        super().__init__(files.size(name))
        self._files = files
        self._name = name

    def read_at(self, position: int, length: int) -> bytes:
        return self._files.read_range(self._name, position, length)


def _real(path: Path) -> Path:
    # `Path.resolve` raises for links in a circle; here such a path stays as it is, and opening it fails.
    return Path(os.path.realpath(path))


def _walk_folder(root: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each file below a folder, and why it cannot be read (mostly empty).

    Args:
        root: the folder.
        prefix: a folder in it, with a slash at its end, if only the files below that are wanted.
    """
    real_root = _real(root)
    # A folder that has become a link since it was listed is not followed either.
    waiting = [prefix] if _real(root / prefix) == real_root / prefix else []
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = list(scan)
        except PermissionError:
            yield folder.rstrip("/"), LOCKED_FOLDER
            continue
        except FileNotFoundError:
            continue  # removed since its parent was read
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            yield folder.rstrip("/"), DEEP_FOLDER
            continue

        for entry in entries:
            name = folder + entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            else:
                is_plain = entry.is_file(follow_symlinks=False)
                yield name, "" if is_plain else _problem(root / name, real_root)


def _problem(path: Path, root: Path) -> str:
    """Return why a link or a special file is not read; empty for a link to a file inside the source."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return LOCKED
    except OSError:
        return BROKEN_LINK  # its target does not exist, or it leads to itself
    # Linked folders are not followed: they may contain themselves.
    if stat.S_ISDIR(mode):
        return LINKED_FOLDER
    if not stat.S_ISREG(mode):
        return SPECIAL
    return "" if _real(path).is_relative_to(root) else OUTSIDE_LINK


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file.

    Raises:
        RefusedError: if it is something else, or may not be read.
    """
    try:
        # Without O_NONBLOCK, a pipe would wait forever for a program that writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise RefusedError(NO_ACCESS, path.name[:200]) from error
    except OSError as error:
        # A socket cannot be opened, nor a link that leads to itself.
        if error.errno in (errno.ENXIO, errno.ELOOP):
            raise RefusedError(NOT_REGULAR, path.name[:200]) from error
        raise

    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(path)
        raise RefusedError(NOT_REGULAR, path.name[:200])
    return os.fdopen(descriptor, "rb")


def raise_unless_content(error: Exception) -> None:
    """Raise errors of the disk, which have a number; errors in a file's content only cost rows."""
    # Damaged content can ask for a place that no file has, which the system calls an invalid argument.
    is_content = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in (None, errno.EINVAL)
    if isinstance(error, OSError) and not is_content:
        raise error


def _without_braces(path: str) -> str:
    """Return the way out of a path with braces, which are not expanded."""
    return f"braces are not expanded: write {BRACES.sub('*', path)}"


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
