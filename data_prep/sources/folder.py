"""A folder of images, with a metadata file (column `file_name`) or with a text file next to each image.

This is Hugging Face's imagefolder convention. A "file" of this source is a folder. A folder with metadata
includes everything below it, any other only the files directly in it. Images that no metadata row names are
rows too, after the others. So are other files that were meant to be samples: they are left out with a reason.
"""

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.clips.large_file import Media
from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles
from data_prep.sources.media import read_media
from data_prep.sources.parquet import records_of
from data_prep.sources.sample import (
    IMAGE_SUFFIXES,
    MAX_FIELD_BYTES,
    NO_IMAGE,
    OUTSIDE,
    UNREADABLE,
    UNUSABLE,
    Inventory,
    Place,
    RefusedError,
    Sample,
    media_suffixes,
)
from data_prep.sources.webdataset import BAD_JSON, parse_fields

BAD_LINE = "source: damaged metadata line"
OTHER_SUFFIX = "source: not an image file"
IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
TEXT_ENDINGS = (".txt", ".caption", ".json")
METADATA = "metadata"
"""Name without suffix of the files that describe a folder's images, whether they can be read or not."""
MAX_METADATA_BYTES = 1 << 30
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# For the whole process: a long caption then costs its own row and not the rest of its file.
csv.field_size_limit(MAX_METADATA_BYTES)

Row = dict[str, Any] | None
"""A row of metadata; None for a damaged one."""


class FolderSource:
    """Image files, local or in a bucket."""

    def __init__(self, source: SourceConfig, videos: bool = False) -> None:
        self._path = source.path
        self._endings = tuple(f".{suffix}" for suffix in media_suffixes(videos))
        self._files = SourceFiles(source.path)
        self._image = source.image
        self._listed_alone: dict[str, _Unit] = {}
        """Units whose own files alone were listed."""

    def inventory(self) -> Inventory:
        """Return the folders that are units of their own (`.` is the root), and what they leave out.

        Raises:
            UserError: if there are none.
        """
        _, inventory = self._units
        return inventory

    @cached_property
    def _units(self) -> tuple[dict[str, "_Unit"], Inventory]:
        """The files of each unit, from one listing of the whole source."""
        names, inventory = self._files.inventory()
        units = self._units_of(names)
        for name, unit in units.items():
            # Someone may take `metadata.tsv` for the captions' file, so it is shown by its name.
            inventory.ignore(unit.set_aside(), stem=METADATA)
            if unit.size:
                inventory.units[name] = unit.size
        inventory.check(self._path)
        if not inventory.units:
            raise self._files.nothing_there(" or ".join(self._endings), inventory)
        return units, inventory

    def _units_of(self, names: Sequence[str]) -> dict[str, "_Unit"]:
        """Return the unit of each of some files by its name."""
        described = {_folder_of(name) for name in names if posixpath.basename(name) in READERS}
        units: dict[str, _Unit] = {}
        for name in names:
            unit = units.setdefault(self._unit_name(_folder_of(name), described), _Unit())
            unit.add(name, self._endings)
        return units

    def _unit(self, name: str) -> "_Unit | None":
        """Return a unit of the frozen list; None if it has no files any more.

        A task reads a share of the units, so only the unit's folder is listed, unless all were listed before.
        No folder above it had metadata when the list was made, or the unit would not be in it.
        """
        if "_units" in self.__dict__ or name == "." or not self._files.usable(name):
            return self._units[0].get(name)
        if name not in self._listed_alone:
            unit = self._units_of(self._files.names_below(name)).get(name)
            if unit is None:
                return None
            unit.set_aside()
            self._listed_alone[name] = unit
        return self._listed_alone[name]

    def _unit_name(self, folder: str, described: set[str]) -> str:
        """Return the unit that a folder's files belong to."""
        # Metadata below other metadata belongs to the outer folder, so that no image is listed twice.
        parts = folder.split("/")
        for end in range(len(parts) + 1):
            outer = "/".join(parts[:end]) or "."
            if outer in described:
                return outer

        # Files of a folder whose name cannot be a key are rows of the folder above.
        while folder != "." and not self._files.usable(folder):
            folder = _folder_of(folder)
        return folder

    def version(self, name: str) -> str:
        """Return a text that is another one after files came to a folder, or its metadata has changed."""
        unit = self._unit(name) or _Unit()
        metadata = [self._files.version(path) for path in sorted(unit.metadata)]
        # Not of each image: looking at millions of them would take hours, and `pairs` checks their hashes.
        return "; ".join([f"{unit.size} files", *metadata])

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield the rows of the folder's metadata, then the files that no row named.

        Raises:
            FileNotFoundError: if the folder no longer exists.
        """
        yield from self.read_rows(name, columns, 0, None)

    def cuts(self, name: str, rows: int) -> list[int]:
        """Return the ends of pieces of `rows` rows; none if the folder has no more.

        Pieces are lines of its metadata, and then files.
        """
        # One task cuts all units, for which one listing of the whole source is less.
        unit = self._units[0].get(name, _Unit())
        if unit.size <= rows and not any(self._files.size(path) > rows for path in unit.metadata):
            return []  # even a line without anything is a byte
        count = sum(1 for _ in self._rows(unit))
        return [*range(rows, count, rows), count] if count > rows else []

    def fingerprint(self, name: str) -> str:
        """Return a text that is another one if `cuts` may be others."""
        unit = self._unit(name) or _Unit()
        digest = xxhash.xxh64(self.version(name).encode())
        for path in itertools.chain(sorted(unit.images), [""], sorted(unit.others)):
            digest.update(path.encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def read_rows(self, name: str, columns: Sequence[str], start: int, end: int | None) -> Iterator[Sample]:
        """Yield rows `start` to `end` (None = all that come) of what `read` yields.

        Raises:
            FileNotFoundError: if the folder no longer exists.
        """
        unit = self._unit(name)
        if unit is None:
            raise FileNotFoundError(name)
        rows = itertools.islice(self._rows(unit), start, end)
        yield from self._files.read_ahead(rows, lambda row: row.load())

    def _rows(self, unit: "_Unit") -> Iterator["_Row"]:
        """Yield all rows of a unit, without reading their images."""
        named: set[str] = set()
        for path in sorted(unit.metadata):
            for row in self._metadata_rows(path):
                named.add(row.path)
                yield row

        # After all metadata, since any row of it may name an image.
        for path in sorted(set(unit.images) - named):
            fields = partial(self._fields, unit.texts_of(path))
            yield _Row(partial(self._sample, path, fields), path)
        for path in sorted(set(unit.others) - named):
            yield _Row.without(Sample(path, reason=OTHER_SUFFIX, detail=posixpath.basename(path)[:200]))

    def _metadata_rows(self, path: str) -> Iterator["_Row"]:
        try:
            data = self._files.read(path, MAX_METADATA_BYTES)
            if data.startswith(UTF16):
                yield _Row.without(Sample(path, reason=UNREADABLE, detail="UTF-16: save it as UTF-8"))
                return
            folder = posixpath.dirname(path)
            for number, row in enumerate(READERS[posixpath.basename(path)](data)):
                yield self._metadata_row(f"{path}:{number}", folder, row)
        except RefusedError as error:
            yield _Row.without(Sample(path, reason=error.reason, detail=error.detail))
        except (csv.Error, pa.ArrowException, OSError, ValueError) as error:
            # A disk's or network's error has a number; a vanished file must not cost rows for good.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            yield _Row.without(Sample(path, reason=UNREADABLE, detail=str(error)[:200]))

    def _metadata_row(self, key: str, folder: str, row: Row) -> "_Row":
        if row is None:
            return _Row.without(Sample(key, reason=BAD_LINE))

        column = self._name_column(row)
        file_name = row.get(column)
        if not isinstance(file_name, str) or not file_name:
            missing = "" if column in row else f" among the columns {', '.join(row)}"
            detail = f"no {column}{missing}"[:200]
            return _Row.without(Sample(key, record=row, reason=NO_IMAGE, detail=detail))

        # Tables written on Windows have backslashes, which no key has.
        name = self._files.resolve(posixpath.join(folder, file_name.replace("\\", "/")))
        if name is None:
            return _Row.without(Sample(key, record=row, reason=OUTSIDE, detail=file_name[:200]))
        return _Row(partial(self._sample, name, lambda: row), name)

    def _name_column(self, row: dict[str, Any]) -> str:
        """Return the column of paths: `file_name`, the setting `image`, or else the only `*_file_name`."""
        like = [name for name in row if name.endswith("_file_name")]
        for column in ("file_name", self._image, *(like if len(like) == 1 else [])):
            if column in row:
                return column
        return "file_name"

    def _fields(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the fields in the text files next to an image."""
        # Sorted, because of `1.TXT` and `1.txt` the latter counts.
        paths = {posixpath.splitext(path)[1].lower(): path for path in sorted(texts)}
        document, text = paths.get(".json"), paths.get(".txt", paths.get(".caption"))
        return parse_fields(
            None if document is None else self._files.read(document, MAX_FIELD_BYTES),
            None if text is None else self._files.read(text, MAX_FIELD_BYTES),
        )

    def _sample(self, name: str, read_fields: Callable[[], dict[str, Any]]) -> Sample:
        # Nothing is read for a name that no store accepts, neither the image nor its text.
        if not self._files.usable(name):
            return Sample(name, reason=UNUSABLE)

        place = Place(path=name)
        record: dict[str, Any] = {}
        try:
            record = read_fields()
            return Sample(name, read_media(self._files, name), record, place)
        except RefusedError as error:
            return Sample(name, None, record, place, error.reason, error.detail)
        except ValueError as error:
            return Sample(name, None, record, place, BAD_JSON, str(error)[:200])
        # Any other error is a fault of the disk or the network, which must stop the scan and not cost rows.
        except (FileNotFoundError, IsADirectoryError):
            return Sample(name, None, record, place, NO_IMAGE)

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, Media | None]]:
        """Yield images by their path."""
        yield from self._files.fetch(places, lambda place: read_media(self._files, place.path))


class _Row(NamedTuple):
    """A row whose image is not read yet."""

    load: Callable[[], Sample]
    path: str = ""
    """File of the image, if it has one."""

    @classmethod
    def without(cls, sample: Sample) -> "_Row":
        """Return the row of a sample that has no image to read."""
        return cls(lambda: sample)


@dataclass
class _Unit:
    """The files of one folder, or of everything below a folder with metadata."""

    metadata: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Path without the suffix of a text file -> paths of the text files."""
    others: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of files."""
        return sum(map(len, (self.metadata, self.images, self.others, *self.texts.values())))

    def add(self, path: str, endings: tuple[str, ...]) -> None:
        """Add a file of the unit; `endings` are those of images, or images and videos."""
        if posixpath.basename(path) in READERS:
            self.metadata.append(path)
        elif path.lower().endswith(endings):
            self.images.append(path)
        elif path.lower().endswith(TEXT_ENDINGS):
            self.texts.setdefault(posixpath.splitext(path)[0], []).append(path)
        else:
            self.others.append(path)

    def set_aside(self) -> list[str]:
        """Remove the files that are no part of a row, once all files are here, and return them."""
        used = {self._stem(path) for path in self.images}
        if self.metadata:
            # Any row of the metadata may name any file; those that none names are rows at the end.
            unused = self.texts.keys() - used
            self.others += [path for stem in unused for path in self.texts.pop(stem)]
            return []

        # A file that has a text of its own was meant to be a sample.
        texts = {path: self._stem(path) for path in self.others if not _is_metadata(path)}
        meant = [path for path, stem in texts.items() if stem not in {None, *used}]
        aside = sorted(set(self.others) - set(meant))
        self.others = meant
        for stem in self.texts.keys() - used - {self._stem(path) for path in meant}:
            aside += self.texts.pop(stem)
        return aside

    def texts_of(self, path: str) -> list[str]:
        """Return the text files next to an image."""
        stem = self._stem(path)
        return [] if stem is None else self.texts[stem]

    def _stem(self, path: str) -> str | None:
        """Return the stem of an image's text files, `1` or `1.png` for `1.png`; None if it has none."""
        for stem in (posixpath.splitext(path)[0], path):
            if stem in self.texts:
                return stem
        return None


def _jsonl(data: bytes) -> Iterator[Row]:
    """Yield a row per line; None for a line that is not a JSON object."""
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None


def _csv(data: bytes) -> Iterator[Row]:
    # Invalid UTF-8 becomes surrogates, which `clean_caption` refuses.
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    for row in csv.DictReader(text):
        # Cells beyond the header's columns have the key None.
        yield {name: value for name, value in row.items() if isinstance(name, str)}


def _parquet(data: bytes) -> Iterator[Row]:
    # Without threads, as in `dataset.records`.
    for batch in pq.ParquetFile(io.BytesIO(data), pre_buffer=False).iter_batches(use_threads=False):
        yield from records_of(batch)


READERS: dict[str, Callable[[bytes], Iterator[Row]]] = {
    "metadata.jsonl": _jsonl,
    "metadata.csv": _csv,
    "metadata.parquet": _parquet,
}
"""Name of a metadata file -> its reader."""


def _is_metadata(path: str) -> bool:
    return posixpath.basename(path).lower().partition(".")[0] == METADATA


def _folder_of(path: str) -> str:
    return posixpath.dirname(path) or "."
