"""What a source yields: one row, before anything is decided about it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

NO_IMAGE = "source: no image"
UNREADABLE = "source: file unreadable"
CUT_SHORT = "source: file cut short"
OUTSIDE = "source: path leads out of the source"


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
