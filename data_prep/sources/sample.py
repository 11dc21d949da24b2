"""One row of a source, before anything is decided about it, and the account of a source's files."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from data_prep.clips.large_file import Media

NO_IMAGE = "source: no image"
UNREADABLE = "source: file unreadable"
CUT_SHORT = "source: file cut short"
OUTSIDE = "source: path leads out of the source"
NO_ACCESS = "source: no permission to read"
NOT_REGULAR = "source: not a regular file"
TOO_LARGE = "source: file too large"
UNUSABLE = "source: unusable file name"
IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "png", "webp", "gif", "avif", "bmp")
VIDEO_SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv")
"""Suffixes of videos, which are read for a dataset with `clips`. Animations have those of images."""
MAX_FIELD_BYTES = 16 << 20
"""Bytes of the text that belongs to one image."""
# Bounds the memory of what waits for a worker; the image that reaches the limit is still included.
CHUNK_BYTES = 32 << 20


class Place(NamedTuple):
    """Position of an image in its source file; each source gives the numbers its own meaning."""

    offset: int = 0
    length: int = 0
    path: str = ""


@dataclass
class Sample:
    """One row of a source file."""

    key: str
    image: Media | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """The row's fields: captions, and columns that filters read."""
    place: Place = field(default_factory=Place)
    reason: str = ""
    """Reason why the source cannot deliver this row, which may be the unreadable rest of a damaged file."""
    detail: str = ""


def media_suffixes(videos: bool) -> tuple[str, ...]:
    """Return the suffixes of the files that are samples: images, and videos if they are wanted."""
    return IMAGE_SUFFIXES + VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES


class RefusedError(Exception):
    """A file of a source that is not read; `reason` is one of the constants above."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


MAX_IGNORED_KINDS = 50


@dataclass
class Inventory:
    """All files below a source's path: every one belongs to a unit of rows, or is ignored and counted."""

    found: int = 0
    """Number of files there."""
    units: dict[str, int] = field(default_factory=dict)
    """Name of a unit (a tar, a folder, ...) -> number of files that it consists of."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Suffix, or reason -> number of files that no unit reads."""

    @property
    def names(self) -> list[str]:
        """The names of the units, sorted."""
        return sorted(self.units)

    def ignore(self, names: Iterable[str], stem: str = "") -> None:
        """Count files as ignored, each under its suffix.

        Args:
            names: the files.
            stem: name without suffix of the files that are counted under their whole name.
        """
        for name in names:
            whole = name.rpartition("/")[2]
            base, dot, suffix = whole.lower().rpartition(".")
            # An archive's suffix alone, `.gz`, would not say that it is a tar.
            archive = ".tar" if base.endswith(".tar") else ""
            is_named = stem and base.partition(".")[0] == stem
            kind = printable(whole if is_named else f"{archive}.{suffix}")[:20] if dot else "no suffix"
            # Foreign names could have any number of suffixes.
            full = len(self.ignored) >= MAX_IGNORED_KINDS and kind not in self.ignored
            self.ignored["other suffixes" if full else kind] += 1

    def check(self, path: str) -> None:
        """Check that every file is counted once.

        Raises:
            RuntimeError: if not.
        """
        counted = sum(self.units.values()) + sum(self.ignored.values())
        if counted != self.found:
            raise RuntimeError(f"{path}: {self.found} files, but {counted} are read or ignored")


class HasImage(Protocol):
    """An object with the bytes of an image, or with none yet."""

    @property
    def image(self) -> Media | None:
        """The encoded image or video."""
        ...


T = TypeVar("T", bound=HasImage)


def printable(text: str) -> str:
    """Return foreign text with `?` for every unprintable character, including unpaired surrogates."""
    # Arrow refuses lone surrogates, and control characters would garble a terminal.
    return "".join(character if character.isprintable() else "?" for character in text)


def in_chunks(rows: Iterable[T], max_rows: int) -> Iterator[list[T]]:
    """Yield chunks of at most `max_rows` rows; a chunk also ends when its images reach `CHUNK_BYTES`."""
    chunk: list[T] = []
    size = 0
    for row in rows:
        chunk.append(row)
        # A large file is not in memory, and much work.
        size += min(len(row.image or b""), CHUNK_BYTES)
        if len(chunk) == max_rows or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
