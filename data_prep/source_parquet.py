"""Parquet files with images as bytes or as paths, read row group by row group.

The image column holds bytes, a path relative to the source's root, or Hugging Face's struct of `bytes` and `path`.
Bytes inside a row group cannot be addressed alone: a row group is read once for every group of parts that needs rows of it.
Small row groups (100 to 1,000 rows) keep that cheap; memory stays at a few rows whatever their size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import SourceConfig
from data_prep.sample import NO_IMAGE, OUTSIDE, UNREADABLE, Place, Sample
from data_prep.source_files import SourceFiles
from data_prep.source_folder import fetch_paths

BATCH = 16
READ_AHEAD = 1 << 20
NO_COLUMN = "source: no image column"
ODD_IMAGE = "source: image is neither bytes nor a path"


class ParquetSource:
    """Parquet files, local or in a bucket."""

    addressable = False

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
        for position, data in fetch_paths(self._files, [places[position] for position in paths]):
            yield paths[position], data
        groups: dict[int, dict[int, int]] = {}
        for position, place in enumerate(places):
            if not place.path:
                groups.setdefault(place.offset, {})[place.length] = position
        if not groups:
            return
        try:
            with self._files.open(name) as file, self._opened(file) as parquet:
                for group, wanted in sorted(groups.items()):
                    yield from self._group_rows(parquet, group, wanted)
        except FileNotFoundError:
            for wanted in groups.values():
                for position in wanted.values():
                    yield position, None

    def _group_rows(self, parquet: pq.ParquetFile, group: int, wanted: dict[int, int]) -> Iterator[tuple[int, bytes | None]]:
        row, last = 0, max(wanted)
        for batch in parquet.iter_batches(BATCH, [group], [self._image], use_threads=False):
            for offset in range(batch.num_rows):
                if row + offset in wanted:
                    value = batch.column(0)[offset].as_py()
                    yield wanted[row + offset], value.get("bytes") if isinstance(value, dict) else value
            row += batch.num_rows
            if row > last:
                return


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
