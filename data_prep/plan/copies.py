"""Captions of exact duplicates, handed to the row that stays.

Data sets with several captions per image often have a row for each, in one source file or in several.
"""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from data_prep.plan.captions import MAX_CAPTIONS
from data_prep.plan.scan import CAPTIONS
from model.common.files import naming_full_disk


class Copies:
    """The captions of dropped duplicates by the hash of their image; on disk, since there may be many."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A temporary file: after a crash it is made again, so nothing has to survive one.
        self._table = sqlite3.connect(path)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute("CREATE TABLE copies (hash INTEGER, id INTEGER, captions TEXT)")

    def add(self, table: pa.Table) -> None:
        """Add duplicates: rows of a scan table with `id`, `hash` and `captions`.

        Raises:
            UserError: if the disk is full.
        """
        rows = [
            (_signed(row["hash"]), row["id"], json.dumps(row["captions"], ensure_ascii=False))
            for row in table.to_pylist()
        ]
        with _naming_full_disk(self._path):
            self._table.executemany("INSERT INTO copies VALUES (?, ?, ?)", rows)

    def complete(self) -> None:
        """Make the duplicates findable; none is added later.

        Raises:
            UserError: if the disk is full.
        """
        with _naming_full_disk(self._path):
            self._table.execute("CREATE INDEX by_hash ON copies (hash, id)")
            self._table.commit()

    def hand_over(self, table: pa.Table, rows: Sequence[int]) -> pa.Table:
        """Add the captions of their duplicates to some rows of a scan table; equal ones count once."""
        captions = table["captions"].to_pylist()
        hashes = table["hash"].take(pa.array(rows, pa.int64())).to_pylist()

        for row, hash in zip(rows, hashes, strict=True):
            unique = {(entry["kind"], entry["text"]): entry for entry in captions[row]}
            query = "SELECT captions FROM copies WHERE hash = ? ORDER BY id"
            for (text,) in self._table.execute(query, [_signed(hash)]):
                unique |= {(entry["kind"], entry["text"]): entry for entry in json.loads(text)}
                if len(unique) >= MAX_CAPTIONS:
                    break
            captions[row] = list(unique.values())[:MAX_CAPTIONS]

        column = table.schema.get_field_index("captions")
        return table.set_column(column, "captions", pa.array(captions, CAPTIONS))

    def close(self) -> None:
        """Close the file."""
        self._table.close()


def _signed(hash: int) -> int:
    """Return a hash as an integer of SQLite, which has no unsigned ones of 64 bits."""
    return hash - (1 << 64) if hash >= 1 << 63 else hash


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    with naming_full_disk(path):
        try:
            yield
        except sqlite3.OperationalError as error:
            # A used-up quota is an error of writing for SQLite, not a full disk.
            if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
