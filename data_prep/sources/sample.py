"""What a source yields: one row, before anything is decided about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

NO_IMAGE = "source: no image"
UNREADABLE = "source: file unreadable"
CUT_SHORT = "source: file cut short"
OUTSIDE = "source: path leads out of the source"
CHUNK_BYTES = 32 << 20


class Place(NamedTuple):
    """Where an image lies in its source file; what the numbers mean is the source's business."""

    offset: int = 0
    length: int = 0
    path: str = ""


@dataclass
class Sample:
    """One row of a source file."""

    key: str
    image: bytes | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """The row's fields: captions, and columns that filters look at."""
    place: Place = field(default_factory=Place)
    reason: str = ""
    """Why the source itself cannot offer this row; a row also stands for the unreadable rest of a damaged file."""
    detail: str = ""


class HasImage(Protocol):
    """Whatever carries the bytes of an image, or none yet."""

    @property
    def image(self) -> bytes | None:
        """The encoded image."""
        ...


T = TypeVar("T", bound=HasImage)


def printable(text: str) -> str:
    """Return text from a foreign file with `?` for every character that cannot be shown, so also for unpaired surrogates."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def in_chunks(rows: Iterable[T], most: int) -> Iterator[list[T]]:
    """Chunks of at most `most` rows, each ended by the row that brings its images to `CHUNK_BYTES`."""
    chunk: list[T] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.image or b"")
        if len(chunk) == most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
