"""Reading of a dataset's records and tables: checked, and read again before they count as damaged."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow
import pyarrow.parquet
import xxhash

from data_prep.store.faults import TooLargeError, retry_seconds
from data_prep.store.store import Store, StoreError

Result = TypeVar("Result")

MAX_OBJECT_BYTES = 4 << 30
"""Size of the largest object that is read at once: the scan table of a source file of many million rows."""


def read_object(dataset: Store, key: str, parse: Callable[[bytes], Result], way_out: str) -> Result:
    """Read a small object and parse it.

    Args:
        dataset: the dataset's store.
        key: the object's key.
        parse: returns the content, or raises `ValueError` with what is wrong.
        way_out: what to do if the object is damaged, as the end of the error message.

    Raises:
        FileNotFoundError: if there is no such object.
        StoreError: if it is damaged; the message names it.
    """

    def read() -> Result:
        try:
            return parse(dataset.read(key, MAX_OBJECT_BYTES))
        except TooLargeError as error:
            raise ValueError(f"over {MAX_OBJECT_BYTES:,} bytes") from error

    return read_checked(dataset, key, read, way_out)


def read_checked(dataset: Store, key: str, read: Callable[[], Result], way_out: str) -> Result:
    """Read and check something of an object, and read it again before it counts as damaged.

    Args:
        dataset: the dataset's store.
        key: the object's key.
        read: returns the content, or raises `ValueError` with what is wrong.
        way_out: what to do if the object is damaged, as the end of the error message.

    Raises:
        FileNotFoundError: if there is no such object.
        StoreError: if it is damaged; the message names it.
    """
    try:
        return read()
    except ValueError:
        # An endpoint or a proxy in trouble may answer 200 with a page of its own. No message should ask
        # anyone to delete good data because of that, so a moment later the object is read once more.
        if dataset.local_path(key) is None:
            time.sleep(retry_seconds() / 600)
    try:
        return read()
    except ValueError as error:
        raise StoreError(f"{dataset.uri}/{key}: damaged: {error}: {way_out}") from error


def hashed(xxh64: str) -> Callable[[bytes], bytes]:
    """Return a parser that only compares the hash.

    Args:
        xxh64: hash of the whole object.
    """

    def parse(data: bytes) -> bytes:
        if xxhash.xxh64_hexdigest(data) != xxh64:
            raise ValueError("its content does not match its hash")
        return data

    return parse


def parse_table(
    data: bytes,
    schema: pyarrow.Schema | None = None,
    columns: Sequence[str] | None = None,
    group: int | None = None,
) -> pyarrow.Table:
    """Return a parquet file's table.

    Args:
        data: the file.
        schema: names and types that the file must have; None = any.
        columns: columns to read; None = all.
        group: the only row group to read; None = all.

    Raises:
        ValueError: if it is damaged, or has another schema or no such row group.
    """
    with _as_damage():
        file = _open_table(data, schema)
        names = None if columns is None else list(columns)
        if group is None:
            return file.read(names, use_threads=False)
        return file.read_row_group(group, names, use_threads=False)


def count_groups(data: bytes, schema: pyarrow.Schema | None) -> int:
    """Return the number of row groups of a parquet file; a schema of None is any.

    Raises:
        ValueError: if it is damaged, or has another schema.
    """
    with _as_damage():
        return _open_table(data, schema).num_row_groups


def _open_table(data: bytes, schema: pyarrow.Schema | None) -> pyarrow.parquet.ParquetFile:
    # Neither here nor in a read may pyarrow start a thread: one that lets go of `data` last, while the
    # interpreter exits, ends the process with `terminate called without an active exception`.
    file = pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True, pre_buffer=False)
    if schema is not None and not file.schema_arrow.equals(schema):
        raise ValueError("it has other columns than this version writes")
    return file


@contextmanager
def _as_damage() -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into `ValueError`."""
    try:
        yield
    # Besides its own errors it raises these, for instance because a size in the file is absurd.
    except (pyarrow.ArrowException, OSError, LookupError, MemoryError, OverflowError, TypeError) as error:
        raise ValueError(f"not a readable parquet file ({type(error).__name__})") from error
