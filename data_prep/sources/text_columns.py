"""Texts of records whose form is unknown, and which of them are captions."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CAPTION_WORDS = (
    "caption",
    "captions",
    "text",
    "txt",
    "prompt",
    "description",
    "alt",
    "sentence",
    "sentences",
)
"""Words in the names of captions, the likeliest first."""
TITLE_WORDS = ("title", "label", "name", "category", "class", "tags")
"""Words in names of fields that serve as captions if there is nothing better."""
OTHER_WORDS = {
    *("url", "uri", "link", "path", "file", "filename", "hash", "sha256", "md5", "id", "key", "exif", "date"),
    *("license", "licence", "author", "credit", "copyright", "source", "error", "status", "lang", "language"),
}
"""Words in the names of fields that are no captions."""
ADDRESS = re.compile(r"\w+://|[\w.~-]*/[\w./~-]*$|[\w.-]+\.\w{2,5}$|[\d\W_]*$|[0-9a-f]{16,}$", re.IGNORECASE)
"""Beginning of an address, a path, a file name, a number or a hash."""
RECORD = re.compile(r"\s*[\[{]")
MIN_WORDS = 4
"""Words per text of a caption whose field is not named like one."""
MAX_LETTERS = 4096
"""Letters of a text that are compared."""
MAX_COLUMNS = 200
MAX_CAPTIONS = 4
"""Fields that are chosen."""


@dataclass
class TextColumn:
    """Texts of one field."""

    values: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Row -> its texts."""
    words: int = 0
    longest: int = 0
    """Letters of the longest text."""
    odd: int = 0
    """Rows with an address, a number or a record in place of a text."""

    def add(self, row: int, texts: list[str]) -> None:
        """Add the texts of a row."""
        self.values[row] = tuple(text[:MAX_LETTERS] for text in texts)
        self.longest = max(self.longest, *map(len, texts))
        self.words += len(texts[0].split())
        self.odd += bool(ADDRESS.match(texts[0].strip()) or RECORD.match(texts[0]))

    @property
    def is_prose(self) -> bool:
        """True if the texts read like captions: several words, and seldom the same."""
        rows = len(self.values)
        return self.is_text and self.words >= MIN_WORDS * rows and 2 * len(set(self.values.values())) > rows

    @property
    def is_text(self) -> bool:
        """True if most values are words."""
        return 2 * self.odd <= len(self.values)

    @property
    def example(self) -> str:
        """One of the texts."""
        return next(iter(self.values.values()))[0]


@dataclass
class TextColumns:
    """All text fields of the records that were added; `a.b` is field `b` of a record `a`."""

    rows: int = 0
    columns: dict[str, TextColumn] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record."""
        for name, texts in _texts(record):
            # Foreign records may have any number of fields.
            if name in self.columns or len(self.columns) < MAX_COLUMNS:
                self.columns.setdefault(name, TextColumn()).add(self.rows, texts)
        self.rows += 1

    def captions(self) -> dict[str, TextColumn]:
        """Return the fields that hold captions, the likeliest first; empty if there are none."""
        named = [name for name in self.columns if self._is_caption(name)]
        # Titles often name a product or a page, so they count only where there is nothing else.
        candidates = named or [name for name in self.columns if self._is_title(name)]

        # A field that few rows have comes after those that most have.
        words = CAPTION_WORDS if named else TITLE_WORDS
        candidates.sort(key=lambda name: (2 * len(self.columns[name].values) < self.rows, _rank(name, words)))
        chosen: dict[str, TextColumn] = {}
        for name in candidates:
            column = self.columns[name]
            if not any(column.values.items() <= other.values.items() for other in chosen.values()):
                chosen[name] = column
        return dict(list(chosen.items())[:MAX_CAPTIONS])

    def _is_caption(self, name: str) -> bool:
        if _words(name) & OTHER_WORDS:
            return False
        return _rank(name, CAPTION_WORDS) < len(CAPTION_WORDS) or self.columns[name].is_prose

    def _is_title(self, name: str) -> bool:
        is_other = _words(name) & OTHER_WORDS
        return not is_other and _rank(name, TITLE_WORDS) < len(TITLE_WORDS) and self.columns[name].is_text

    def covered(self, names: Mapping[str, object]) -> int:
        """Return the number of rows that have at least one of these fields."""
        return len({row for name in names for row in self.columns[name].values})


def _texts(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the text fields of a record, with their texts that are not empty."""
    for name, value in record.items():
        if isinstance(value, Mapping) and not before:
            yield from _texts(value, f"{name}.")
            continue
        values = value if isinstance(value, list) else [value]
        texts = [text for text in values if isinstance(text, str) and text.strip()]
        if texts:
            yield before + name, texts


def _words(name: str) -> set[str]:
    """Return the words of a name such as `alt_text` or `altText`."""
    return set(re.split(r"[\W_]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def _rank(name: str, words: tuple[str, ...]) -> int:
    """Return the place of the first of `words` in a name; their number if it has none."""
    found = _words(name)
    return next((place for place, word in enumerate(words) if word in found), len(words))
