"""Captions of a sample: gather them from a record's fields, and refuse values that are not text."""

import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_BYTES = 1 << 16
MAX_CAPTIONS = 1000
"""Captions of one kind that a row can have."""
BYTE_ORDER_MARK = "\ufeff"
INVISIBLE = {"Cf", "Mn", "Me", "Zs", "Zl", "Zp"}
"""Unicode categories of white space, marks without a letter, and characters that only format a text."""
MISSING = "caption: missing"
NOT_TEXT = "caption: not text"
EMPTY = "caption: empty"
HUGE = f"caption: over {MAX_BYTES} bytes"
CONTROL = "caption: control characters"
NOT_UTF8 = "caption: not UTF-8"
TOO_MANY = f"caption: more than {MAX_CAPTIONS} in a row"


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
        fields: caption kind -> name of its field, or `a.b` for field `b` in a field `a`.
    """
    # The keys of a dict, because a list would compare each caption with all before it.
    captions: dict[Caption, None] = {}
    refused: list[str] = []
    for kind, field in fields.items():
        value = field_of(record, field)
        texts = value if isinstance(value, list) else [value]
        if len(texts) > MAX_CAPTIONS:
            refused.append(TOO_MANY)
        for text in texts[:MAX_CAPTIONS]:
            # A missing field is no fault as long as another field has a caption.
            if text is None:
                continue
            cleaned = clean_caption(text)
            if cleaned.reason:
                refused.append(cleaned.reason)
            else:
                captions[Caption(kind, cleaned.text)] = None

    if not captions and not refused:
        refused.append(MISSING)
    return list(captions), refused


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record; None if there is none. A name with dots leads into nested records."""
    # A field of that very name first: columns of foreign tables may have dots in their names.
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


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

    # A text saved on Windows may begin with the mark, also one that was copied into a table.
    text = " ".join(text.removeprefix(BYTE_ORDER_MARK).split())
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        return Cleaned("", EMPTY)
    # The control characters that white space does not include: C0, DEL and C1.
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text):
        return Cleaned("", CONTROL)
    return Cleaned(text, "")
