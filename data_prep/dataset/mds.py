"""Shards in MDS, mosaicml-streaming's format. No other file knows how a shard or a row is laid out.

A shard is a count (uint32), the rows' offsets (uint32, one more than there are rows), a JSON header, then the
rows. A row is the sizes (uint32) of its columns of variable size, then its columns in the header's order,
which is that of their names.

Shards are written here and not by streaming's `MDSWriter`, which closes a valid-looking shard after an
exception and takes seconds to import."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.store.faults import StoreError
from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk
from model.common.records import parse_json

MAX_OFFSET = (1 << 32) - 1
"""Offsets are uint32."""

_NUMBERS = "uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64"
# MDS's `int` has 64 bits on every machine.
FIXED = {"int": np.dtype(np.int64)} | {name: np.dtype(name) for name in _NUMBERS.split()}
"""Encodings of fixed size."""

VARIABLE: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "jpeg": bytes,  # images are read as the files that they are
    "png": bytes,
    "str": lambda data: data.decode("utf-8", "surrogateescape"),
    "str_int": int,
    "str_float": float,
    "str_decimal": float,
    "json": json.loads,
}
"""Encodings of variable size. Those that would run code when they are read (pickle) are left out."""

_HEAD_BYTES = 4096
"""Bytes of a row that are read at once: its sizes, and for most rows all of its small columns."""
_WAY_OUT = "delete the file, or run `python -m data_prep verify`"

Span = tuple[int, int]
"""Begin and end of a column in a row, in bytes."""


def decode(encoding: str, data: bytes) -> Any:
    """Return a column's value.

    Args:
        encoding: a key of `FIXED` or `VARIABLE`.
        data: the column's bytes.

    Raises:
        ValueError: if the bytes are no such value.
    """
    if encoding in VARIABLE:
        return VARIABLE[encoding](data)
    (value,) = np.frombuffer(data, FIXED[encoding])
    return value.item()


def _encode(encoding: str, value: Any) -> bytes:
    if encoding in FIXED:
        return np.array(value, FIXED[encoding]).tobytes()
    if encoding == "str":
        return value.encode()
    if encoding == "bytes" and isinstance(value, bytes):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as `{encoding}`")


class RowLayout:
    """Columns of a shard's rows, and where each one is inside a row."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        """Take the columns from a shard's header, or from the shard's record in an `index.json`.

        Args:
            record: with `column_names`, `column_encodings` and `column_sizes` (None = variable).

        Raises:
            ValueError, KeyError, TypeError: if the record lacks one of these, or they do not fit together.
        """
        names: Sequence[str] = record["column_names"]
        self.encodings: dict[str, str] = dict(zip(names, record["column_encodings"], strict=True))
        """Column -> encoding, in the order in which columns are stored."""
        self._sizes: list[tuple[str, int | None]] = list(zip(names, record["column_sizes"], strict=True))
        for name, size in self._sizes:
            # A negative size would shift the columns after it.
            if size is not None and (not isinstance(size, int) or size < 0):
                raise ValueError(f"column {name!r} has the size {size!r}")
        self._variable_sizes = struct.Struct(f"<{sum(size is None for _, size in self._sizes)}I")

    def spans(self, head: bytes, length: int) -> dict[str, Span]:
        """Return where each column of a row is.

        Args:
            head: the row's first bytes, with at least the sizes of its variable columns.
            length: bytes of the whole row.

        Raises:
            ValueError: if the columns do not fill the row exactly.
        """
        if len(head) < self._variable_sizes.size:
            raise ValueError(f"row of {length} bytes, too short for the sizes of its columns")
        variable = iter(self._variable_sizes.unpack_from(head))
        end = self._variable_sizes.size

        spans = {}
        for name, size in self._sizes:
            begin, end = end, end + (next(variable) if size is None else size)
            spans[name] = begin, end
        # Sizes that do not add up come from a damaged row: its columns would be read at wrong places.
        if end != length:
            raise ValueError(f"row of {length} bytes where its columns need {end}")
        return spans

    def encode(self, row: dict[str, Any]) -> bytes:
        """Return a row as it is stored.

        Raises:
            ValueError, TypeError: if the row has other columns, or a value does not fit its encoding.
        """
        # A superfluous column would be dropped without an error.
        if len(row) != len(self.encodings):
            raise ValueError(f"a row has columns {sorted(row)}, not {list(self.encodings)}")
        columns = [_encode(encoding, row[name]) for name, encoding in self.encodings.items()]
        sizes = [len(data) for data, (_, size) in zip(columns, self._sizes, strict=True) if size is None]
        return self._variable_sizes.pack(*sizes) + b"".join(columns)


def write_mds(path: Path, columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one shard; `path` appears only when all rows are in it and on the disk.

    Args:
        path: the shard file.
        columns: name -> MDS encoding: one of fixed size, `bytes` or `str`.
        rows: one dict per row, with just these columns.

    Raises:
        UserError: if the shard would exceed 4 GiB, or the disk is full.
    """
    names = sorted(columns)

    # Streaming's readers expect all of these fields; ours needs the columns alone.
    header = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [FIXED[columns[name]].itemsize if columns[name] in FIXED else None for name in names],
    }

    layout, config = RowLayout(header), json.dumps(header, sort_keys=True).encode()
    # All rows are encoded before the first one is written, because their offsets come first in the file.
    encoded = [layout.encode(row) for row in rows]

    # The first row begins after the count, the offsets and the header. Summed in int64, so that a shard over
    # 4 GiB is noticed and does not wrap around.
    offsets = np.cumsum([4 + 4 * (len(encoded) + 1) + len(config), *map(len, encoded)], dtype=np.int64)
    if offsets[-1] > MAX_OFFSET:
        raise UserError(
            f"{path}: {offsets[-1]:,} bytes, over the 4 GiB of an MDS shard: "
            "plan parts with fewer rows (`part_rows`)"
        )

    with naming_full_disk(path), atomic_path(path, durable=True) as temporary, temporary.open("xb") as file:
        file.write(struct.pack("<I", len(encoded)) + offsets.astype("<u4").tobytes() + config)
        file.writelines(encoded)


def read_offsets(file: BinaryIO, max_rows: int) -> NDArray[np.int64]:
    """Read a shard's first bytes: where each row begins, and where the last one ends.

    Args:
        file: the shard, at its beginning; then at its header.
        max_rows: how many rows it can have, so that a damaged count asks for no gigabytes.

    Raises:
        ValueError: if the file is too short, or has more rows.
    """
    count = int.from_bytes(_read_exactly(file, 4), "little")
    if count > max_rows:
        raise ValueError(f"{count} rows where at most {max_rows} are possible")
    return np.frombuffer(_read_exactly(file, 4 * (count + 1)), "<u4").astype(np.int64)


def _read_exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise ValueError("the file ends too early")
    return data


class Shard:
    """Rows of one shard, read by position: a short or damaged file is an exception, never wrong data.

    The file stays open, so a file that was removed or replaced meanwhile can still be read.
    """

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        """Open a shard.

        Args:
            path: the shard file.
            columns: name -> MDS encoding that the shard must have; all of them keys of `FIXED` or `VARIABLE`.

        Raises:
            FileNotFoundError: if there is no such file; it may have been evicted from a cache.
            StoreError: if the file is not an MDS shard, or has other columns.
        """
        self.path = path
        # Unbuffered: rows are read at their own offsets, and a buffer would read bytes that nobody needs.
        self._file = path.open("rb", buffering=0)
        try:
            # Each row has an offset of 4 bytes, so the size of the file bounds their number.
            self.offsets = read_offsets(self._file, os.fstat(self._file.fileno()).st_size // 4)
            # The header ends where the first row begins. A damaged offset may be before that, and a negative
            # length would read the whole file.
            header = _read_exactly(self._file, max(0, int(self.offsets[0]) - 4 - 4 * len(self.offsets)))
            self._layout = RowLayout(parse_json(header))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not an MDS shard: {_WAY_OUT}") from error
        if self._layout.encodings != columns:
            raise StoreError(f"{path}: has the columns {self._layout.encodings}, not {columns}: {_WAY_OUT}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the decoded rows, one in memory at a time."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row, decoded.

        Raises:
            StoreError: if the row is damaged.
        """
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        data = self.read(start, end - start)
        try:
            spans = self._layout.spans(data, len(data))
            return {
                name: decode(self._layout.encodings[name], data[slice(*span)]) for name, span in spans.items()
            }
        except ValueError as error:
            raise self._damaged(index) from error

    def row(self, index: int) -> "Row":
        """Return one row of which only the beginning has been read.

        Raises:
            StoreError: if the row is damaged.
        """
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        head = self.read(start, min(end - start, _HEAD_BYTES))
        try:
            return Row(self, start, head, self._layout.spans(head, end - start))
        except ValueError as error:
            raise self._damaged(index) from error

    def _damaged(self, index: int) -> StoreError:
        return StoreError(f"{self.path}: row {index} is damaged: {_WAY_OUT}")

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes of the file from `start` on.

        Raises:
            StoreError: if the file is shorter.
        """
        # Damaged offsets may decrease: a negative length becomes an empty read, and so the error below.
        # `pread` has no position in the file that threads could change for one another.
        data = os.pread(self._file.fileno(), max(0, length), start)
        if len(data) != length:
            raise self._ends_too_early()
        return data

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `start` on, without a copy in between.

        Raises:
            StoreError: if the file is shorter.
        """
        done = 0
        while done < len(target):
            # Linux reads at most 2 GiB per call, so a call may fill only a part.
            count = os.preadv(self._file.fileno(), [target[done:]], start + done)
            if not count:
                raise self._ends_too_early()
            done += count

    def _ends_too_early(self) -> StoreError:
        return StoreError(f"{self.path}: the file ends too early: {_WAY_OUT}")

    def announce(self, start: int, length: int) -> None:
        """Ask the system to read these bytes ahead, so that a batch's rows arrive in parallel."""
        os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._file.fileno()


class Row:
    """One row of a shard, of which each column can be read by itself."""

    __slots__ = ("_head", "_spans", "_start", "shard")

    def __init__(self, shard: Shard, start: int, head: bytes, spans: dict[str, Span]) -> None:
        self.shard, self._start, self._head, self._spans = shard, start, head, spans

    def column(self, name: str) -> tuple[int, int]:
        """Return position in the file and size of a column."""
        begin, end = self._spans[name]
        return self._start + begin, end - begin

    def read(self, name: str) -> bytes:
        """Return a small column's bytes."""
        begin, end = self._spans[name]
        if end <= len(self._head):
            return self._head[begin:end]
        return self.shard.read(self._start + begin, end - begin)

    @property
    def id(self) -> int:
        """The sample's id."""
        return int.from_bytes(self.read("id"), "little", signed=True)
