"""Captions of a sample: gathering them from a record's fields, and refusing what is no text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_BYTES = 1 << 16
MISSING = "caption: missing"
NOT_TEXT = "caption: not text"
EMPTY = "caption: empty"
HUGE = f"caption: over {MAX_BYTES} bytes"
CONTROL = "caption: control characters"
NOT_UTF8 = "caption: not UTF-8"


class Caption(NamedTuple):
    """One caption and its kind (`original`, `synthetic`, ...)."""

    kind: str
    text: str


def gather_captions(record: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[list[Caption], list[str]]:
    """Captions that the record's fields hold, in the order of the kinds, and the reason for each one refused.

    A field holds a string or a list of strings; a text over several lines is one caption. Equal captions of one kind count
    once. A record without a caption gives the one reason `caption: missing`.
    """
    captions: list[Caption] = []
    refused: list[str] = []
    for kind, field in fields.items():
        value = record.get(field)
        for text in value if isinstance(value, list) else [value]:
            if text is None:
                continue
            outcome = clean_caption(text)
            if outcome.reason:
                refused.append(outcome.reason)
            elif Caption(kind, outcome.text) not in captions:
                captions.append(Caption(kind, outcome.text))
    if not captions and not refused:
        refused.append(MISSING)
    return captions, refused


class Cleaned(NamedTuple):
    """A caption with its white space in order, or the reason why it is none."""

    text: str
    reason: str


def clean_caption(text: Any) -> Cleaned:
    """One line, runs of white space made one space. Any script is fine; invalid UTF-8 and control characters are not."""
    if not isinstance(text, str):
        return Cleaned("", NOT_TEXT)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Cleaned("", NOT_UTF8)
    if size > MAX_BYTES:
        return Cleaned("", HUGE)
    text = " ".join(text.split())
    if not text:
        return Cleaned("", EMPTY)
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text):
        return Cleaned("", CONTROL)
    return Cleaned(text, "")
