"""Parquet files with images as bytes or as paths, read row group by row group.

The image column holds bytes, a path relative to the source's root, or Hugging Face's struct of `bytes` and
`path`. Bytes inside a row group have no address of their own: `walk` reads each row group that is needed
once, from its start to the last row wanted. It needs memory for a few rows and one data page (writers close a
page every 1,024 rows or sooner), regardless of the size of file and row group.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.clips.large_file import Media
from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles, raise_unless_content
from data_prep.sources.media import read_media
from data_prep.sources.sample import (
    NO_IMAGE,
    OUTSIDE,
    UNREADABLE,
    Inventory,
    Place,
    RefusedError,
    Sample,
    media_suffixes,
)

# Few rows, because each may contain an image of megabytes.
BATCH_ROWS = 16
READ_AHEAD_BYTES = 1 << 20
MAX_LOST_ROWS = 1 << 20
"""Rows of a damaged file that are counted one by one."""
NO_COLUMN = "source: no image column"
ODD_IMAGE = "source: image is neither bytes nor a path"
WEB_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
EMBED = "embed the images (datasets: `map(embed_table_storage)`), or move them below `sources.path`"
BASE64 = re.compile(r"data:|[A-Za-z0-9+/=\s]{200}")


class ParquetSource:
    """Parquet files, local or in a bucket."""

    def __init__(self, source: SourceConfig, videos: bool = False) -> None:
        self._files = SourceFiles(source.path, (".parquet",))
        self._suffixes = media_suffixes(videos)
        self._image = source.image

    def inventory(self) -> Inventory:
        """Return the parquet files.

        Raises:
            UserError: if there are none.
        """
        inventory = self._files.one_by_one()
        # Only the rows show whether the images are in the tables or in files of their own.
        for kind in [kind for kind in inventory.ignored if kind.removeprefix(".") in self._suffixes]:
            inventory.ignored[f"{kind}, read where a row names it"] = inventory.ignored.pop(kind)
        return inventory

    def version(self, name: str) -> str:
        """Return a text that is another one after the parquet file has changed."""
        return self._files.version(name)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all rows with the wanted columns; unreadable rows have that as their reason."""
        yield from self.read_rows(name, columns, 0, None)

    def cuts(self, name: str, rows: int) -> list[int]:
        """Return the ends of pieces of about `rows` rows; none if the file has no more, or is unreadable.

        Pieces are row groups, since bytes inside of one can only be read from its start; only groups of paths
        are cut, which are small.
        """
        try:
            with self._files.open(name) as file, self._opened(file) as parquet:
                groups = range(parquet.num_row_groups)
                sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
                if self._has_paths(parquet.schema_arrow):
                    sizes = [min(rows, size - start) for size in sizes for start in range(0, size, rows)]
        except RefusedError:
            return []
        except (pa.ArrowException, OSError, ValueError) as error:
            raise_unless_content(error)
            return []

        ends = [0]
        for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
            if end - ends[-1] > rows and start > ends[-1]:
                ends.append(start)
        ends.append(sum(sizes))
        return ends[1:] if len(ends) > 2 else []

    def fingerprint(self, name: str) -> str:
        """Return a text that is another one if `cuts` may be others."""
        return self._files.version(name)

    def _has_paths(self, schema: pa.Schema) -> bool:
        """True if the images are in files of their own, by the type of the column."""
        if self._image not in schema.names:
            return True
        kind = schema.field(self._image).type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def read_rows(self, name: str, columns: Sequence[str], start: int, end: int | None) -> Iterator[Sample]:
        """Yield rows `start` to `end` (None = all that come) of what `read` yields."""
        done, total = start, 0
        try:
            with self._files.open(name) as file, self._opened(file) as parquet:
                total = parquet.metadata.num_rows if end is None else end
                records = self._records(
                    parquet, self._wanted(parquet.schema_arrow.names, columns), start, end
                )
                numbered = ((name, *record) for record in records)
                for sample in self._files.read_ahead(numbered, lambda row: self._sample(*row)):
                    yield sample
                    done += 1
        except RefusedError as error:
            yield Sample(name, reason=error.reason, detail=error.detail)
        except (pa.ArrowException, OSError, ValueError) as error:
            # A file that was listed and has vanished is not damaged: its rows must not be dropped for good.
            if isinstance(error, FileNotFoundError):
                raise
            raise_unless_content(error)
            # The number comes from the file, and a damaged one may claim any.
            for number in range(done, max(min(total, done + MAX_LOST_ROWS), done + 1)):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _records(
        self, parquet: pq.ParquetFile, columns: list[str], start: int, end: int | None
    ) -> Iterator[tuple[int, dict[str, Any], Place]]:
        """Yield number, record and place of some rows."""
        first = 0
        for group in range(parquet.num_row_groups):
            if end is not None and first >= end:
                return
            rows = parquet.metadata.row_group(group).num_rows
            if 0 < rows <= start - first:
                first += rows
                continue

            row = 0
            for batch in parquet.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                if first + row + len(batch) <= start:
                    row += len(batch)
                    continue
                for record in records_of(batch):
                    if start <= first + row and (end is None or first + row < end):
                        yield first + row, record, Place(group, row)
                    row += 1
                if end is not None and first + row >= end:
                    return
            first += row

    def _wanted(self, present: Sequence[str], columns: Sequence[str]) -> list[str]:
        """Return the columns of a file to read: the image, and those that the caller reads."""
        wanted: dict[str, None] = {}
        for column in [self._image, *columns]:
            # `meta.short` is a field of the column `meta`, unless there is a column of that very name.
            wanted[column if column in present else column.partition(".")[0]] = None
        return [column for column in wanted if column in present]

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
            return Sample(key, record=record, reason=OUTSIDE, detail=_explained(value))
        try:
            return Sample(key, read_media(self._files, path), record, Place(path=path))
        except RefusedError as error:
            return Sample(key, None, record, Place(path=path), error.reason, error.detail)
        except (FileNotFoundError, IsADirectoryError):
            return Sample(key, None, record, Place(path=path), NO_IMAGE, _explained(value))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, Media | None]]:
        """Yield images by path, or by streaming the row groups that hold them."""
        by_path = [position for position, place in enumerate(places) if place.path]
        paths = [places[position] for position in by_path]
        for index, data in self._files.fetch(paths, lambda place: read_media(self._files, place.path)):
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
            except RefusedError:
                rows = None
            except (pa.ArrowException, OSError, ValueError) as error:
                raise_unless_content(error)

            for place in places:
                image = None
                try:
                    image = rows.at(place) if rows else None
                except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                    raise_unless_content(error)
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


def _explained(value: str) -> str:
    """Return a value that is no path in the source, with what it seems to be."""
    if WEB_ADDRESS.match(value):
        return f"a URL: download the images first: {value[:120]}"
    if BASE64.match(value):
        return f"base64: write the column as bytes: {value[:40]}"
    # `Dataset.to_parquet` writes the paths of images that were not embedded.
    return f"a path: {EMBED}: {value[:80]}"


def records_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows as Python values.

    Decimals become floats. Text that is not UTF-8 stays bytes, and what Python has no value for (times after
    the year 9999, unknown time zones) stays Arrow's scalar, so that it is no text either.
    """
    for number, column in enumerate(batch.columns):
        if pa.types.is_decimal(column.type):
            floats = column.cast(pa.float64())
            batch = batch.set_column(number, batch.schema.names[number], floats)
    try:
        return batch.to_pylist()
    # Arrow's conversions raise ArrowInvalid, OverflowError and those of the time zone packages.
    except Exception:
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
    except Exception:
        return cell
