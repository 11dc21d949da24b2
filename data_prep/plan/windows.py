"""The manifest files of a plan, in units that tasks share (`units`): a run of windows of one bucket each.

The kept rows of a bucket, in the order of the plan, are shuffled in windows and cut into parts. A unit reads
only the rows of its windows, so each is made by itself, and the files are the same as if one task had written
them all.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.dataset.parts import PLAN_AGAIN
from data_prep.dataset.records import read_object
from data_prep.images.buckets import make_buckets
from data_prep.plan.manifest import MANIFEST, PARTS_PER_FILE, write_manifest
from data_prep.plan.rows import JudgedRows
from data_prep.plan.scanned import Scanned
from data_prep.plan.units import FINISH, make_units
from data_prep.sources.source import needs_sequential_reads
from model.common.records import STRICT, Hash, parse_record, seal

UNIT_ROWS = 1 << 20
"""Rows of a unit, about; half a minute of one core."""


class UnitRecord(TypedDict):
    """The object of a unit."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    hashes: dict[str, Hash]
    """xxh64 of each manifest file of the unit by key."""


class _Unit(NamedTuple):
    """Some windows of a bucket."""

    bucket: str
    start: int
    """First row in the bucket; the start of a window and of a manifest file."""
    end: int
    key: str


class Windows:
    """The units of all buckets."""

    def __init__(self, scanned: Scanned, rows: JudgedRows) -> None:
        self._scanned = scanned
        self._rows = rows
        config = scanned.config
        self._part = config.part_rows
        # A multiple of the part, so that only the last part of a bucket can have fewer rows. If images cannot
        # be read at random (parquet with bytes), a part takes neighboring rows.
        windows = 1 if needs_sequential_reads(config) else max(1, config.shuffle_window // config.part_rows)
        self._window = config.part_rows * windows
        # The smallest number of rows with whole windows and whole files.
        self._step = config.part_rows * math.lcm(windows, PARTS_PER_FILE)
        self._ends: dict[str, np.ndarray] = {}
        """For each bucket, the rows up to the end of each group, int64 [groups]."""
        for bucket in make_buckets(config.buckets, config.clip_frames):
            ends = np.cumsum(rows.bucket_rows(bucket.name))
            if ends[-1]:
                self._ends[bucket.name] = ends
        self._units = list(self._plan_units())

    @property
    def parts(self) -> dict[str, list[int]]:
        """Rows of the parts of each bucket that has any."""
        parts: dict[str, list[int]] = {}
        for bucket, ends in self._ends.items():
            whole, rest = divmod(int(ends[-1]), self._part)
            parts[bucket] = [self._part] * whole + ([rest] if rest else [])
        return parts

    def make(self) -> None:
        """Write all manifest files.

        Raises:
            UserError: if a manifest file exists with other content.
            SupersededError: if another task has finished the plan.
        """
        keys = [unit.key for unit in self._units]
        make_units(self._scanned.dataset, self._scanned.share, "windows", keys, self._make_unit)

    def hashes(self) -> dict[str, str]:
        """Return the xxh64 of each manifest file by key."""
        hashes: dict[str, str] = {}
        for unit in self._units:
            record = read_object(
                self._scanned.dataset, unit.key, lambda data: parse_record(UnitRecord, data), PLAN_AGAIN
            )
            hashes |= record["hashes"]
        return hashes

    def _plan_units(self) -> Iterator[_Unit]:
        rows = self._step * max(1, UNIT_ROWS // self._step)
        for bucket, ends in self._ends.items():
            for number, start in enumerate(range(0, int(ends[-1]), rows)):
                key = f"{FINISH}/windows/{bucket}/{number:06d}.json"
                yield _Unit(bucket, start, min(start + rows, int(ends[-1])), key)

    def _make_unit(self, number: int) -> bytes:
        unit = self._units[number]
        hashes: dict[str, str] = {}
        reader = _Reader(self._rows, unit.bucket, self._ends[unit.bucket])
        for start in range(unit.start, unit.end, self._step):
            parts: list[pa.Table] = []
            for first in range(start, min(start + self._step, unit.end), self._window):
                rows = reader.read(first, min(first + self._window, unit.end))
                parts += self._shuffled(rows, unit.bucket, first)
            for first in range(0, len(parts), PARTS_PER_FILE):
                file = (start // self._part + first) // PARTS_PER_FILE
                some = parts[first : first + PARTS_PER_FILE]
                hashes |= write_manifest(self._scanned.dataset, unit.bucket, file, some)
        return seal({"hashes": hashes})

    def _shuffled(self, rows: pa.Table, bucket: str, first: int) -> list[pa.Table]:
        """Return the parts of the window that begins at row `first` of a bucket."""
        # The 1 separates this random stream from that of the order of files.
        seed = [self._scanned.config.seed, 1, *bucket.encode(), first // self._window]
        order = np.random.default_rng(seed).permutation(len(rows))
        rows = rows.take(pa.array(order)).combine_chunks()
        return [rows.slice(start, self._part) for start in range(0, len(rows), self._part)]


class _Reader:
    """Rows of a bucket, read forward; the group that was read last is in memory."""

    def __init__(self, rows: JudgedRows, bucket: str, ends: np.ndarray) -> None:
        self._rows = rows
        self._bucket = bucket
        self._ends = ends
        self._group = -1
        self._table = MANIFEST.empty_table()

    def read(self, start: int, end: int) -> pa.Table:
        """Return rows `start` to `end` of the bucket (`MANIFEST`)."""
        tables = []
        group = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            if self._ends[group] <= start:
                group += 1  # it has no row of this bucket
                continue
            if group != self._group:
                self._group, self._table = group, self._rows.read(group, self._bucket)
            stop = min(end, int(self._ends[group]))
            offset = int(self._ends[group]) - len(self._table)
            tables.append(self._table.slice(start - offset, stop - start))
            start = stop
        return pa.concat_tables(tables).combine_chunks()
