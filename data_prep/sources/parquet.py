"""Parquet files with images as bytes or as paths, read row group by row group.

The image column holds bytes, a path relative to the source's root, or Hugging Face's struct of `bytes` and `path`.
Bytes inside a row group cannot be addressed alone: `walk` reads each row group that is needed once, from its start to the last
row wanted. Memory is that of a few rows and of one data page (writers close one every 1,024 rows or sooner), whatever the size of
file and row group.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import NO_IMAGE, OUTSIDE, UNREADABLE, Place, Sample

BATCH = 16
READ_AHEAD = 1 << 20
NO_COLUMN = "source: no image column"
ODD_IMAGE = "source: image is neither bytes nor a path"


class ParquetSource:
    """Parquet files, local or in a bucket."""

    def __init__(self, source: SourceConfig) -> None:
        self._files = SourceFiles(source.path, (".parquet",))
        self._image = source.image

    def files(self) -> list[str]:
        """Names of the parquet files."""
        return self._files.names()

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """All rows with the wanted columns; a damaged file gives what can be read and one row that says so."""
        done = total = 0
        try:
            with self._files.open(name) as file, self._opened(file) as parquet:
                total = parquet.metadata.num_rows
                wanted = [column for column in dict.fromkeys([self._image, *columns]) if column in parquet.schema_arrow.names]
                for group in range(parquet.num_row_groups):
                    row = 0
                    for batch in parquet.iter_batches(BATCH, [group], wanted, use_threads=False):
                        for record in _records(batch):
                            yield self._sample(name, done, record, Place(group, row))
                            done, row = done + 1, row + 1
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            _raise_unless_content(error)
            rest = max(1, total - done)
            for number in range(done, done + rest):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _opened(self, file: Any) -> pq.ParquetFile:
        return pq.ParquetFile(file, buffer_size=READ_AHEAD, pre_buffer=False)

    def _sample(self, name: str, number: int, record: dict[str, Any], place: Place) -> Sample:
        key = f"{name}:{number}"
        if self._image not in record:
            return Sample(key, record=record, reason=NO_COLUMN, detail=self._image)
        value = record.pop(self._image)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            return Sample(key, record=record, reason=NO_IMAGE)
        if isinstance(value, bytes):
            return Sample(key, value, record, place)
        if not isinstance(value, str):
            return Sample(key, record=record, reason=ODD_IMAGE, detail=type(value).__name__)
        path = self._files.inside(value)
        if path is None:
            return Sample(key, record=record, reason=OUTSIDE, detail=value[:200])
        try:
            return Sample(key, self._files.read(path), record, Place(path=path))
        except (FileNotFoundError, IsADirectoryError):
            return Sample(key, record=record, place=Place(path=path), reason=NO_IMAGE, detail=path[:200])

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Images by path, or by streaming the row groups that hold them."""
        paths = [position for position, place in enumerate(places) if place.path]
        for position, data in self._files.fetch([places[at] for at in paths], lambda place: self._files.read(place.path)):
            yield paths[position], data
        rows = sorted((position for position, place in enumerate(places) if not place.path), key=lambda at: places[at])
        if rows:
            yield from zip(rows, self.walk(name, (places[position] for position in rows)), strict=True)

    def walk(self, name: str, places: Iterable[Place]) -> Iterator[bytes | None]:
        """Images at `places`, which are taken one at a time and must ascend; None where the file or its content is gone."""
        with ExitStack() as stack:
            rows: _Rows | None = None
            try:
                file = stack.enter_context(self._files.open(name))
                rows = _Rows(stack.enter_context(self._opened(file)), self._image)
            except (pa.ArrowException, OSError, ValueError) as error:
                _raise_unless_content(error)
            for place in places:
                image = None
                try:
                    image = rows.at(place) if rows else None
                except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                    _raise_unless_content(error)
                    rows = None
                yield image


class _Rows:
    """A column of images, read forwards."""

    def __init__(self, parquet: pq.ParquetFile, column: str) -> None:
        self._parquet = parquet
        self._column = column
        self._group, self._next = -1, 0
        self._values: Iterator[pa.Scalar] = iter(())

    def at(self, place: Place) -> bytes | None:
        """The image at `place`, which lies behind the one before; None = there is none."""
        if place.offset != self._group:
            self._group, self._next, self._values = place.offset, 0, self._read(place.offset)
        value = next(itertools.islice(self._values, place.length - self._next, None), None)
        self._next = place.length + 1
        return None if value is None else value.as_py()

    def _read(self, group: int) -> Iterator[pa.Scalar]:
        if group < self._parquet.num_row_groups:
            for batch in self._parquet.iter_batches(BATCH, [group], [self._column], use_threads=False):
                column = batch.column(0)
                yield from column.field("bytes") if pa.types.is_struct(column.type) else column


def _raise_unless_content(error: Exception) -> None:
    """Errors of the disk have a number, those about a file's content have none: only the latter cost rows."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        raise error


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python values; text that is not UTF-8 stays bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = {
            name: [_value(cell) for cell in column] for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        return [{name: values[row] for name, values in columns.items()} for row in range(batch.num_rows)]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.cast(pa.binary()).as_py() if pa.types.is_string(cell.type) else None
