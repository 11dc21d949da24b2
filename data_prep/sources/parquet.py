"""Parquet files with images as bytes or as paths, read row group by row group.

The image column holds bytes, a path relative to the source's root, or Hugging Face's struct of `bytes` and
`path`. Bytes inside a row group have no address of their own: `walk` reads each row group that is needed
once, from its start to the last row wanted. It needs memory for a few rows and one data page (writers close a
page every 1,024 rows or sooner), regardless of the size of file and row group.
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

# Few rows, because each may contain an image of megabytes.
BATCH_ROWS = 16
READ_AHEAD_BYTES = 1 << 20
NO_COLUMN = "source: no image column"
ODD_IMAGE = "source: image is neither bytes nor a path"


class ParquetSource:
    """Parquet files, local or in a bucket."""

    def __init__(self, source: SourceConfig) -> None:
        self._files = SourceFiles(source.path, (".parquet",))
        self._image = source.image

    def files(self) -> list[str]:
        """Return the names of the parquet files."""
        return self._files.names()

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all rows with the wanted columns; unreadable rows have that as their reason."""
        done = total = 0
        try:
            with self._files.open(name) as file, self._opened(file) as parquet:
                total = parquet.metadata.num_rows
                present = set(parquet.schema_arrow.names)
                wanted = [column for column in dict.fromkeys([self._image, *columns]) if column in present]
                for group in range(parquet.num_row_groups):
                    row = 0
                    for batch in parquet.iter_batches(BATCH_ROWS, [group], wanted, use_threads=False):
                        for record in _records(batch):
                            yield self._sample(name, done, record, Place(group, row))
                            done += 1
                            row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            # A file that was listed and has vanished is not damaged: its rows must not be dropped for good.
            if isinstance(error, FileNotFoundError):
                raise
            _raise_unless_content(error)
            for number in range(done, max(total, done + 1)):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _opened(self, file: Any) -> pq.ParquetFile:
        # Pre-buffering would load whole row groups.
        return pq.ParquetFile(file, buffer_size=READ_AHEAD_BYTES, pre_buffer=False)

    def _sample(self, name: str, number: int, record: dict[str, Any], place: Place) -> Sample:
        key = f"{name}:{number}"
        if self._image not in record:
            return Sample(key, record=record, reason=NO_COLUMN, detail=self._image)

        value = record.pop(self._image)
        if isinstance(value, dict):
            # Hugging Face's struct has the bytes if the file embeds them, otherwise a path.
            value = value.get("bytes") or value.get("path")
        if value is None:
            return Sample(key, record=record, reason=NO_IMAGE)
        if isinstance(value, bytes):
            return Sample(key, value, record, place)
        if not isinstance(value, str):
            return Sample(key, record=record, reason=ODD_IMAGE, detail=type(value).__name__)

        path = self._files.resolve(value)
        if path is None:
            return Sample(key, record=record, reason=OUTSIDE, detail=value[:200])
        try:
            return Sample(key, self._files.read(path), record, Place(path=path))
        except (FileNotFoundError, IsADirectoryError):
            return Sample(key, record=record, place=Place(path=path), reason=NO_IMAGE, detail=path[:200])

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images by path, or by streaming the row groups that hold them."""
        by_path = [position for position, place in enumerate(places) if place.path]
        paths = [places[position] for position in by_path]
        for index, data in self._files.fetch(paths, lambda place: self._files.read(place.path)):
            yield by_path[index], data

        in_rows = [position for position, place in enumerate(places) if not place.path]
        # `walk` only moves forward.
        in_rows.sort(key=lambda position: places[position])
        if in_rows:
            images = self.walk(name, (places[position] for position in in_rows))
            yield from zip(in_rows, images, strict=True)

    def walk(self, name: str, places: Iterable[Place]) -> Iterator[bytes | None]:
        """Yield the images at `places`; None if the file or its content can no longer be read.

        Args:
            name: the parquet file.
            places: row groups and rows in ascending order, consumed one at a time.
        """
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
                    rows = None  # the position in the file is unknown now
                yield image


class _Rows:
    """A column of images, read forward only."""

    def __init__(self, parquet: pq.ParquetFile, column: str) -> None:
        self._parquet = parquet
        self._column = column
        self._group = -1
        self._next = 0
        self._values: Iterator[pa.Scalar] = iter(())

    def at(self, place: Place) -> bytes | None:
        """Return the image at `place`, which must come after the previous one; None if there is none."""
        # For bytes in parquet, `offset` is the row group and `length` the row in it.
        if place.offset != self._group:
            self._group = place.offset
            self._next = 0
            self._values = self._read(place.offset)

        value = next(itertools.islice(self._values, place.length - self._next, None), None)
        self._next = place.length + 1
        return None if value is None else value.as_py()

    def _read(self, group: int) -> Iterator[pa.Scalar]:
        if group < self._parquet.num_row_groups:
            for batch in self._parquet.iter_batches(BATCH_ROWS, [group], [self._column], use_threads=False):
                column = batch.column(0)
                yield from column.field("bytes") if pa.types.is_struct(column.type) else column


def _raise_unless_content(error: Exception) -> None:
    """Raise errors of the disk, which have a number; errors in a file's content only cost rows."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        raise error


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows as Python values; text that is not UTF-8 stays bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # One bad cell fails the whole batch, so each cell is converted by itself.
        records: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for record, cell in zip(records, column, strict=True):
                record[name] = _value(cell)
        return records


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.cast(pa.binary()).as_py() if pa.types.is_string(cell.type) else None
