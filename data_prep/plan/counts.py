"""Counts of a plan: rows by source file and reason, captions by kind, and the files that sources ignored."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from data_prep.sources.source import SourceFile

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

BRACKET = r"^[\[{]"
"""Start of captions that may be a list or a record as text."""
MAX_EXAMPLES = 3
MAX_EXAMPLE = 200
"""Characters of an example."""


class GroupCounts:
    """Counts of the rows of some source files."""

    def __init__(self, kinds: list[str], files: Sequence[SourceFile]) -> None:
        """Begin to count.

        Args:
            kinds: names of the caption kinds.
            files: the files.
        """
        self._kinds = kinds
        self._files: dict[int, dict[str, Any]] = {
            file.number: {"number": file.number, "label": file.label, "rows": 0, "kept": 0, "dropped": {}}
            for file in files
        }
        self._captions: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._bracketed = 0
        self._examples: list[str] = []

    def add(self, file: SourceFile, table: pa.Table) -> None:
        """Count some rows of a source file."""
        reasons = Counter(table["reason"].to_pylist())
        count = self._files[file.number]
        count["rows"] += len(table)
        # An empty reason means that the row is kept.
        count["kept"] += reasons.pop("", 0)
        count["dropped"] = dict(Counter(count["dropped"]) + reasons)

        self._refused.update(itertools.chain.from_iterable(table["refused"].to_pylist()))
        captions = table.filter(pc.equal(table["reason"], ""))["captions"].combine_chunks().flatten()
        kinds = captions.field("kind").to_pylist()
        lengths = pc.utf8_length(captions.field("text")).to_pylist()
        for kind, length in zip(kinds, lengths, strict=True):
            self._captions[self._kinds[kind]] += 1
            self._letters[self._kinds[kind]] += length

        self._bracketed += pc.sum(pc.match_substring_regex(captions.field("text"), BRACKET)).as_py() or 0
        missing = MAX_EXAMPLES - len(self._examples)
        for text in captions.field("text")[:missing].to_pylist():
            self._examples.append(text[:MAX_EXAMPLE])

    def record(self) -> dict[str, Any]:
        """Return the counts, as `merge_counts` takes them."""
        captions = {
            "kept": dict(self._captions),
            "letters": dict(self._letters),
            "refused": dict(self._refused),
            "bracketed": self._bracketed,
            "examples": self._examples,
        }
        return {"files": list(self._files.values()), "captions": captions}


def merge_counts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all files for `manifest/plan.json`, from those of groups in the plan's order."""
    files: list[dict[str, Any]] = []
    captions: dict[str, Any] = {"kept": Counter(), "letters": Counter(), "refused": Counter()}
    bracketed, examples = 0, []
    for record in records:
        files += record["files"]
        for name, counts in captions.items():
            counts.update(record["captions"][name])
        bracketed += record["captions"]["bracketed"]
        examples += record["captions"]["examples"]

    files.sort(key=lambda file: file["number"])
    captions = {name: dict(counts) for name, counts in captions.items()}
    captions |= {"bracketed": bracketed, "examples": examples[:MAX_EXAMPLES]}
    return {"files": files, "captions": captions}


def check_counts(files: Sequence[dict[str, Any]], planned: int) -> None:
    """Check that all rows read were kept or dropped, and that the rows kept are those of the parts.

    Args:
        files: counts by source file (`merge_counts`).
        planned: rows of all parts.

    Raises:
        RuntimeError: if not.
    """
    for file in files:
        dropped = file["dropped"]
        if file["rows"] != file["kept"] + sum(dropped.values()):
            raise RuntimeError(
                f"{file['label']}: {file['rows']} rows read, {file['kept']} kept, {dropped} dropped"
            )
    kept = sum(file["kept"] for file in files)
    if kept != planned:
        raise RuntimeError(f"{kept} rows were kept but {planned} are planned")
