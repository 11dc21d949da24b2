"""The scanned files of a plan, as its steps see them: in groups, with the rows that a step passes on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from data_prep.config import DatasetConfig
from data_prep.plan.against import NO_SET, EvaluationSets
from data_prep.plan.packs import read_section, read_sections
from data_prep.plan.scan_tables import exact_hashes, scan_key
from data_prep.plan.units import FINISH, make_units, unit_keys
from data_prep.plan.verdicts import FILTERED, IN_SET, KEPT
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store
from model.common.share import Share

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

ANNOTATED = "annotated"
"""Step that applies the filters on annotations, with a unit per source file."""

PAIR = np.dtype([("id", "<i8"), ("first", "<i8")])
"""A row of an exact duplicate, and the row with the smallest id of the same hash; for the latter row itself,
both are equal."""
MARK = np.dtype([("id", "<i8"), ("code", "u1")])
"""A row, and its verdict."""


@dataclass(frozen=True)
class Scanned:
    """The scanned files of a plan, in groups."""

    config: DatasetConfig
    dataset: Store
    share: Share
    files: Sequence[SourceFile]
    groups: Sequence[Sequence[int]]
    """Numbers of the files of each group."""
    ranges: int
    """Number of ranges of the hash."""
    sets: EvaluationSets | None

    @cached_property
    def group_of(self) -> np.ndarray:
        """Group of each file, int64 [files]."""
        groups = np.empty(len(self.files), np.int64)
        for number, files in enumerate(self.groups):
            groups[list(files)] = number
        return groups

    def table_key(self, number: int) -> str:
        """Key of the scan table of a file in which all filters have left their reasons."""
        return f"{FINISH}/{ANNOTATED}/{number:06d}" if self.config.annotations else scan_key(number)

    def make(self, step: str, count: int, make: Any) -> None:
        """Make the missing units of a step, of which there are `count`."""
        make_units(self.dataset, self.share, step, unit_keys(step, count), make)

    def section(self, step: str, unit: int, number: int, count: int) -> bytes:
        """Return a section of the pack of one unit."""
        return read_section(self.dataset, unit_keys(step, unit + 1)[unit], number, count)

    def sections(self, step: str, units: int, number: int, count: int) -> Iterator[bytes]:
        """Yield the section of the same number of all units."""
        return read_sections(self.dataset, unit_keys(step, units), number, count)

    def by_group(self, rows: np.ndarray) -> list[bytes]:
        """Return rows (with a field `id`) as a section per group."""
        return split(rows, self.group_of[rows["id"] >> 32], len(self.groups))


def split(rows: np.ndarray, place: np.ndarray, count: int) -> list[bytes]:
    """Return rows as `count` sections; `place` has the section of each row."""
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(count + 1)).tolist()
    rows = rows[order]
    return [rows[bounds[number] : bounds[number + 1]].tobytes() for number in range(count)]


def first_verdicts(table: pa.Table, sets: EvaluationSets | None) -> np.ndarray:
    """Return the verdicts, uint8 [rows], that need no other row: those of the filters and of equal files."""
    verdicts = np.where(pc.equal(table["reason"], "").to_numpy(), KEPT, FILTERED).astype(np.uint8)
    if sets is not None:
        equal = sets.with_equal_hash(exact_hashes(table["hash"]))
        found = (verdicts == KEPT) & (equal != NO_SET)
        verdicts[found] = IN_SET + equal[found]
    return verdicts
