"""Roll-ups: the commits of many parts in one object, so that a reader of all needs no request per part.

They are derived, and the commits stay the one truth. A row counts only for a commit that the listing shows
with the same content (its ETag, or size and time of change), so a commit that was deleted or made again is
noticed, and a roll-up that is lost, stale or damaged costs time and nothing else. Tasks write one over what
they committed; a reader that had to read many commits by themselves, or many small roll-ups, writes one over
these.

`rollups/<kind>/<xxh64 of the file>.parquet`
"""

import hashlib
import io
import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

from data_prep.dataset.records import hashed, parse_table
from data_prep.dataset.schema import Commit, Part
from data_prep.store.entry import Entry
from data_prep.store.faults import TooLargeError
from data_prep.store.store import Store
from model.common.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "rollups"
MIN_ROWS = 64
"""Commits below which a roll-up saves too little."""
MAX_ROWS = 1 << 16
MAX_BYTES = 1 << 30
MERGE_FILES = 16
"""Small roll-ups of use from which on one is written in their place: each is a request of each reader."""
READERS = 4
"""Roll-ups that are read ahead of their use."""

SCHEMA = pyarrow.schema(
    [
        ("bucket", pyarrow.string()),
        ("number", pyarrow.int64()),
        ("version", pyarrow.string()),
        ("md5", pyarrow.string()),
        ("record", pyarrow.binary()),
    ]
)
"""Columns, with one row per commit; `version` is empty if the writer did not know it."""


class Record(NamedTuple):
    """The record of a commit, as it is in the store."""

    part: Part
    version: str
    """`Entry.version` of the object; empty if unknown."""
    data: bytes


def write_rollups(dataset: Store, kind: str, records: Iterable[Record]) -> None:
    """Write some commits as roll-ups, unless they are few. A store that takes no more objects is no error."""
    every = list(records)
    if len(every) < MIN_ROWS:
        return
    for start in range(0, len(every), MAX_ROWS):
        some = every[start : start + MAX_ROWS]
        columns = {
            "bucket": [record.part.bucket for record in some],
            "number": [record.part.number for record in some],
            "version": [record.version for record in some],
            "md5": [hashlib.md5(record.data, usedforsecurity=False).hexdigest() for record in some],
            "record": [record.data for record in some],
        }
        sink = io.BytesIO()
        table = pyarrow.Table.from_pydict(columns, SCHEMA)
        pyarrow.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
        data = sink.getvalue()
        try:
            dataset.put_new(f"{FOLDER}/{kind}/{xxhash.xxh64_hexdigest(data)}.parquet", data)
        except UserError as error:
            log.warning("no roll-up of %d commits: %s", len(table), error)
            return


def write_committed(dataset: Store, kind: str, commits: Iterable[Commit]) -> None:
    """Write the commits that a task made, or read, as a roll-up."""
    records = []
    for commit in commits:
        key = commit.part.commit_key(kind)
        # A bucket's listing shows the MD5. A folder's shows the time of change.
        if dataset.local_path(key) is None:
            records.append(Record(commit.part, "", commit.to_json()))
        elif dataset.exists(key):
            # The time before the content: if the record is replaced in between, the row does not count.
            version = dataset.version(key)
            records.append(Record(commit.part, version, dataset.read(key)))
    write_rollups(dataset, kind, records)


class Rollups:
    """The roll-ups of a kind, as a reader of all commits uses and writes them.

    The largest are read first, and none any more once all commits are found. If many small ones were of use,
    one takes their place; `gc` removes those that are of no use.
    """

    def __init__(self, dataset: Store, kind: str, listed: Mapping[Part, Entry]) -> None:
        """Read nothing yet.

        Args:
            dataset: the dataset's store.
            kind: `pairs`, or the family's name.
            listed: the objects of all commits.
        """
        self.used: set[str] = set()
        """Keys of the roll-ups that had commits which no larger one has."""
        self._dataset = dataset
        self._kind = kind
        self._listed = listed
        self._small: list[Record] = []
        self._small_files = 0
        self._records: list[Record] = []

    def read(self) -> Iterator[Commit]:
        """Yield the commits that roll-ups have with the content that the listing shows; none twice."""
        found: set[Part] = set()
        for key, table in self._tables():
            is_small = len(table) < MAX_ROWS // 4
            before = len(found)
            for record, commit in self._current(table, found):
                found.add(record.part)
                if is_small:
                    self._small.append(record)
                yield commit
            if len(found) > before:
                self.used.add(key)
                self._small_files += is_small
            if len(self._small) >= MAX_ROWS:
                write_rollups(self._dataset, self._kind, self._small)
                self._small, self._small_files = [], 0
            if len(found) == len(self._listed):
                return

    def add(self, part: Part, data: bytes) -> None:
        """Take a commit that none has, to be written."""
        self._records.append(Record(part, self._listed[part].version, data))
        if len(self._records) >= MAX_ROWS:
            write_rollups(self._dataset, self._kind, self._records)
            self._records = []

    def write(self) -> None:
        """Write what was added, and one in place of the small ones if they are many."""
        if self._small_files >= MERGE_FILES:
            self._records += self._small
        write_rollups(self._dataset, self._kind, self._records)

    def _tables(self) -> Iterator[tuple[str, pyarrow.Table]]:
        """Yield key and table of each roll-up, the largest first."""
        entries = list(self._dataset.listing(f"{FOLDER}/{self._kind}/"))
        keys = [entry.key for entry in sorted(entries, key=lambda entry: (-entry.bytes, entry.key))]
        waiting: deque[tuple[str, Future[pyarrow.Table]]] = deque()
        with ThreadPoolExecutor(READERS) as pool:
            for key in keys:
                waiting.append((key, pool.submit(_read, self._dataset, key)))
                if len(waiting) > READERS:
                    first, table = waiting.popleft()
                    yield first, table.result()
            for key, table in waiting:
                yield key, table.result()

    def _current(self, table: pyarrow.Table, found: set[Part]) -> Iterator[tuple[Record, Commit]]:
        """Yield the rows of a roll-up that are as the listing shows, but those that were found."""
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                part = Part(str(row["bucket"]), row["number"] or 0)
                entry = self._listed.get(part)
                if part in found or entry is None or not _is_same(entry, row["version"], row["md5"]):
                    continue
                commit = _parse(row["record"])
                if commit is not None and (commit.kind, commit.part) == (self._kind, part):
                    yield Record(part, entry.version, row["record"]), commit


def _is_same(entry: Entry, version: str, md5: str) -> bool:
    return entry.version != "" and entry.version in (version, f'"{md5}"')


def _parse(data: bytes) -> Commit | None:
    try:
        return Commit.from_json(data)
    except ValueError:
        return None  # the object itself is read, and the error names it


def _read(dataset: Store, key: str) -> pyarrow.Table:
    """Return a roll-up; without rows if it is damaged, or was removed."""
    digest = re.fullmatch(r".*/([0-9a-f]{16})\.parquet", key)
    try:
        if digest is None:
            raise ValueError("not a roll-up's name")
        return parse_table(hashed(digest[1])(dataset.read(key, MAX_BYTES)), SCHEMA)
    except (ValueError, FileNotFoundError, TooLargeError, UserError) as error:
        log.warning("%s/%s: not used: %s", dataset.uri, key, error)
        return SCHEMA.empty_table()
