"""One row of a source, before anything is decided about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

NO_IMAGE = "source: no image"
UNREADABLE = "source: file unreadable"
CUT_SHORT = "source: file cut short"
OUTSIDE = "source: path leads out of the source"
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
    image: bytes | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """The row's fields: captions, and columns that filters read."""
    place: Place = field(default_factory=Place)
    reason: str = ""
    """Reason why the source cannot deliver this row, which may be the unreadable rest of a damaged file."""
    detail: str = ""


class HasImage(Protocol):
    """An object with the bytes of an image, or with none yet."""

    @property
    def image(self) -> bytes | None:
        """The encoded image."""
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
        size += len(row.image or b"")
        if len(chunk) == max_rows or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
