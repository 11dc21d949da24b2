"""An object as a listing shows it."""

from typing import NamedTuple


class Entry(NamedTuple):
    """One object of a listing."""

    key: str
    modified: float
    """Seconds since 1970."""
    bytes: int
    version: str
    """A text that is another one after the object was replaced: ETag, or size and time of change."""
