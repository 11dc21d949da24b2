"""The judged rows of a plan, in units that tasks share (`units`): tables of dropped rows, and kept rows.

The steps, each in a unit per group of source files:

    copies  captions of exact duplicates, split by the group of the row that stays
    rows    the group's kept rows, split by bucket, and its counts; besides, `dropped/<file>.parquet`
"""

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.dataset.records import parse_table
from data_prep.images.buckets import make_buckets
from data_prep.plan.copies import Copies
from data_prep.plan.counts import GroupCounts
from data_prep.plan.duplicates import Duplicates
from data_prep.plan.manifest import MANIFEST
from data_prep.plan.packs import pack
from data_prep.plan.scan import SCAN
from data_prep.plan.scan_tables import read_scan
from data_prep.plan.scanned import Scanned
from data_prep.plan.verdicts import COPIED, reasons_of, with_reasons
from model.common.files import naming_full_disk
from model.common.records import canonical_json

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

_DROPPED_COLUMNS = ("id", "key", "reason", "detail", "offset", "length", "path")
DROPPED = pa.schema([(name, SCAN.field(name).type) for name in _DROPPED_COLUMNS])
"""Columns of `dropped/<file number>.parquet`, with one row per sample that the plan left out."""
DROPPED_FOLDER = "dropped"

COPIES = pa.schema([(name, SCAN.field(name).type) for name in ("id", "hash", "captions")])
"""Columns of exact duplicates whose captions another row gets."""
ROWS_PER_WRITE = 1 << 14
"""Rows of a bucket that are written together."""


def dropped_key(number: int) -> str:
    """Key of the table of rows of source file `number` that the plan left out."""
    return f"{DROPPED_FOLDER}/{number:08d}.parquet"


class JudgedRows:
    """The steps, and the rows that they leave."""

    def __init__(self, scanned: Scanned, duplicates: Duplicates) -> None:
        self._scanned = scanned
        self._duplicates = duplicates
        self._reasons = reasons_of(scanned.config)
        self._buckets = [
            bucket.name for bucket in make_buckets(scanned.config.buckets, scanned.config.clip_frames)
        ]

    def make(self) -> None:
        """Make all units.

        Raises:
            UserError: if the disk is full.
            SupersededError: if another task has finished the plan.
        """
        groups = len(self._scanned.groups)
        if self._scanned.config.dedupe.exact:
            self._scanned.make("copies", groups, self._collect_copies)
        self._scanned.make("rows", groups, self._judge_group)

    @cached_property
    def counts(self) -> list[dict[str, Any]]:
        """The record of each group (`GroupCounts.record`), with the rows of each bucket as `buckets`."""
        sections = self._scanned.sections("rows", len(self._scanned.groups), 0, 1 + len(self._buckets))
        return [json.loads(section) for section in sections]

    def bucket_rows(self, bucket: str) -> np.ndarray:
        """Return the number of kept rows of a bucket by group, int64 [groups]."""
        return np.array([counts["buckets"].get(bucket, 0) for counts in self.counts], np.int64)

    def read(self, group: int, bucket: str) -> pa.Table:
        """Return a group's kept rows of one bucket, in the order of the plan (`MANIFEST`)."""
        number = 1 + self._buckets.index(bucket)
        data = self._scanned.section("rows", group, number, 1 + len(self._buckets))
        return parse_table(data, MANIFEST) if data else MANIFEST.empty_table()

    def _collect_copies(self, group: int) -> bytes:
        scanned = self._scanned
        pairs = self._duplicates.pairs(group)
        pairs = pairs[pairs["id"] != pairs["first"]]
        pairs = pairs[np.argsort(pairs["id"])]

        tables: dict[int, list[pa.Table]] = defaultdict(list)
        for number in sorted(set((pairs["id"] >> 32).tolist())):
            for table in read_scan(scanned.dataset, scanned.table_key(number), columns=COPIES.names):
                ids = table["id"].to_numpy()
                places = np.flatnonzero(np.isin(ids, pairs["id"]))
                firsts = pairs["first"][np.searchsorted(pairs["id"], ids[places])]
                owners = scanned.group_of[firsts >> 32]
                for owner in np.unique(owners).tolist():
                    tables[owner].append(table.take(places[owners == owner]).select(COPIES.names))
        empty: list[pa.Table] = []
        sections = (tables.get(owner, empty) for owner in range(len(scanned.groups)))
        return pack([_parquet(pa.concat_tables(parts)) if parts else b"" for parts in sections])

    def _judge_group(self, group: int) -> bytes:
        """Section 0 has the counts, the others the kept rows of each bucket."""
        scanned = self._scanned
        files = [scanned.files[number] for number in scanned.groups[group]]
        counts = GroupCounts(scanned.config.caption_kinds, files)
        codes = self._duplicates.codes(group)
        buckets = {name: _BucketRows() for name in self._buckets}
        with (
            tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder,
            closing(self._copies(group, Path(folder) / "copies")) as copies,
        ):
            path, row = Path(folder) / "dropped.parquet", 0
            for file in files:
                with naming_full_disk(path), pq.ParquetWriter(path, DROPPED, compression="zstd") as dropped:
                    for table in read_scan(scanned.dataset, scanned.table_key(file.number)):
                        table = self._judged(table, codes[row : row + len(table)], copies)
                        row += len(table)
                        counts.add(file, table)
                        left_out = table.filter(pc.not_equal(table["reason"], ""))
                        dropped.write_table(left_out.select(DROPPED.names))
                        _add_kept(table, buckets)
                scanned.dataset.put_new(dropped_key(file.number), path.read_bytes())

        sections = [rows.finish() for rows in buckets.values()]
        by_bucket = {name: rows.count for name, rows in buckets.items() if rows.count}
        return pack([canonical_json({**counts.record(), "buckets": by_bucket}), *sections])

    def _copies(self, group: int, path: Path) -> Copies:
        """Return the captions of the exact duplicates of a group's rows."""
        copies = Copies(path)
        if self._scanned.config.dedupe.exact:
            for section in self._copied_sections(group):
                copies.add(parse_table(section, COPIES))
        copies.complete()
        return copies

    def _copied_sections(self, group: int) -> Iterator[bytes]:
        groups = len(self._scanned.groups)
        # No group has duplicates of a group in which no row has any.
        pairs = self._duplicates.pairs(group)
        if (pairs["id"] == pairs["first"]).any():
            yield from filter(None, self._scanned.sections("copies", groups, group, groups))

    def _judged(self, table: pa.Table, codes: np.ndarray, copies: Copies) -> pa.Table:
        """Return rows of a scan table with their reasons, and with the captions of their exact duplicates."""
        verdicts = self._duplicates.verdicts(table, codes)
        table = with_reasons(table, verdicts, self._reasons)
        copied = np.flatnonzero(verdicts == COPIED).tolist()
        return copies.hand_over(table, copied) if copied else table


class _BucketRows:
    """The kept rows of one bucket of a group, compressed as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[pa.Table] = []
        self._sink = io.BytesIO()
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Add some rows (`MANIFEST`)."""
        self.count += len(table)
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROWS_PER_WRITE:
            self._write()

    def finish(self) -> bytes:
        """Return all rows as parquet; empty without rows."""
        if self._waiting:
            self._write()
        if self._writer:
            self._writer.close()
        return self._sink.getvalue()

    def _write(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, MANIFEST, compression="zstd", use_dictionary=False)
        self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting = []


def _add_kept(table: pa.Table, buckets: dict[str, _BucketRows]) -> None:
    """Add the kept rows among judged ones to their buckets."""
    kept = table.filter(pc.equal(table["reason"], ""))
    for name in pc.unique(kept["bucket"]).to_pylist():
        rows = kept.filter(pc.equal(kept["bucket"], name))
        buckets[name].add(rows.select(MANIFEST.names).cast(MANIFEST))


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()
