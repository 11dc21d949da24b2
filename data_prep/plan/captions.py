"""Captions of a sample: gather them from a record's fields, and refuse values that are not text."""

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
    """Return the captions in a record's fields, in the order of the kinds, and a reason for each one refused.

    A field holds a string or a list of strings; a text over several lines is one caption. Equal captions of
    one kind count once. A record without a caption gives the single reason `caption: missing`.

    Args:
        record: a source row's fields.
        fields: caption kind -> name of its field.
    """
    captions: list[Caption] = []
    refused: list[str] = []
    for kind, field in fields.items():
        value = record.get(field)
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            # A missing field is no fault as long as another field has a caption.
            if text is None:
                continue
            cleaned = clean_caption(text)
            if cleaned.reason:
                refused.append(cleaned.reason)
            elif Caption(kind, cleaned.text) not in captions:
                captions.append(Caption(kind, cleaned.text))

    if not captions and not refused:
        refused.append(MISSING)
    return captions, refused


class Cleaned(NamedTuple):
    """A caption with normalized white space, or the reason why it is refused."""

    text: str
    reason: str


def clean_caption(text: Any) -> Cleaned:
    """Put a caption on one line, with single spaces.

    Any script is accepted; invalid UTF-8 and control characters are refused.
    """
    if not isinstance(text, str):
        return Cleaned("", NOT_TEXT)
    try:
        # JSON escapes and `surrogateescape` can leave lone surrogates in foreign text.
        size = len(text.encode())
    except UnicodeEncodeError:
        return Cleaned("", NOT_UTF8)
    if size > MAX_BYTES:
        return Cleaned("", HUGE)

    text = " ".join(text.split())
    if not text:
        return Cleaned("", EMPTY)
    # The control characters that white space does not include: C0, DEL and C1.
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text):
        return Cleaned("", CONTROL)
    return Cleaned(text, "")
