"""Tables of scanned files in the store: one per file, committed whole, read a row group at a time."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.dataset.records import count_groups, parse_table, read_object
from data_prep.plan.listing import FOLDER, removed
from data_prep.plan.scan import SCAN
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store, StoreError
from model.common.files import naming_full_disk

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

BATCH_ROWS = 8192
"""Rows of a row group of a scan table."""


def scan_key(number: int) -> str:
    """Key of the scan table of source file `number`."""
    return f"{FOLDER}/{number:08d}.parquet"


def write_scan(
    path: Path, schema: pa.Schema, file: SourceFile, batches: Iterator[pa.RecordBatch], start: int = 0
) -> Iterator[Counter[str]]:
    """Write a file's table, and check that its ids are complete and in order.

    Yields the number of rows by reason, as they are written; the table is complete after the last ones.

    Args:
        path: the table to write.
        schema: its columns.
        file: the file whose rows they are.
        batches: the rows.
        start: number of the first row in the file.

    Raises:
        UserError: if the disk is full.
        RuntimeError: if the ids are not those of the file's rows.
    """
    rows = start
    with (
        naming_full_disk(path),
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in _large_batches(batches):
            first = file.number << 32 | rows
            if batch.column("id").to_pylist() != list(range(first, first + len(batch))):
                raise RuntimeError(f"{file.label}: rows were lost or read twice while scanning")
            rows += len(batch)
            writer.write_batch(batch)
            yield Counter(reason or "kept" for reason in batch.column("reason").to_pylist())


def _large_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Join and cut batches to `BATCH_ROWS` rows; only the last may have fewer.

    So a table depends on its rows only, and not on the batches in which they come.
    """
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        while (missing := BATCH_ROWS - sum(map(len, waiting))) <= len(batch):
            yield pa.concat_batches([*waiting, batch.slice(0, missing)])
            waiting, batch = [], batch.slice(missing)
        waiting.append(batch)
    if any(map(len, waiting)):
        yield pa.concat_batches(waiting)


def read_scan(
    dataset: Store, key: str, schema: pa.Schema = SCAN, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yield a scanned file's table, some thousand rows at a time.

    Args:
        dataset: the dataset's store.
        key: the table's key.
        schema: columns that the table must have.
        columns: columns to read; None = all.

    Raises:
        UserError: if another task has removed the table.
        StoreError: if it is damaged.
    """
    way_out = "delete it and run plan again"

    def parse(data: bytes) -> tuple[bytes, int]:
        return data, count_groups(data, schema)

    try:
        data, groups = read_object(dataset, key, parse, way_out)
    except FileNotFoundError as error:
        raise removed(dataset, key) from error
    for group in range(groups):
        try:
            table = parse_table(data, schema, columns, group)
        except ValueError as error:
            raise StoreError(f"{dataset.uri}/{key}: damaged: {error}: {way_out}") from error
        yield table


def exact_hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of hashes as uint64, bit for bit; 0 for rows without an image.

    pyarrow turns integers beside nulls into float64, which keeps only 53 of their 64 bits.
    """
    return pc.fill_null(column, 0).to_numpy()
