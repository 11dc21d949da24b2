"""MDS folders (mosaicml-streaming's shards with an `index.json`) as a source, read by byte offset."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.config import SourceConfig
from data_prep.dataset.mds import FIXED, VARIABLE, RowLayout, decode, read_offsets
from data_prep.images.images import MAX_FILE_BYTES
from data_prep.sources.files import BAD_NAME, SourceFiles, raise_unless_content
from data_prep.sources.sample import (
    MAX_FIELD_BYTES,
    NO_IMAGE,
    TOO_LARGE,
    UNREADABLE,
    Inventory,
    Place,
    RefusedError,
    Sample,
)
from model.common.errors import UserError, first_line

IMAGES = ("bytes", "jpeg", "png", "jpg")
VALUES = {*FIXED, *VARIABLE}
"""Encodings of columns that a record can hold."""
MAX_ROW_BYTES = MAX_FILE_BYTES + MAX_FIELD_BYTES


class MDSSource:
    """Uncompressed MDS shards, local or in a bucket. A file of this source is a shard."""

    def __init__(self, source: SourceConfig, videos: bool = False) -> None:
        # A column of bytes may hold anything: `videos` changes nothing here.
        self._path = source.path
        self._files = SourceFiles(source.path)
        self._image = source.image
        self._shards: dict[str, tuple[int, RowLayout]] = {}
        """Shard -> number of its rows, and their layout, both from the index."""

    def inventory(self) -> Inventory:
        """Return the shards that the index files below the path list.

        Raises:
            UserError: if there is no index, a shard is compressed, or the image column has no image files.
        """
        # The indexes describe the columns of all shards, so no shard is opened here.
        names, inventory = self._files.inventory()
        usable = [name for name in names if self._files.usable(name)]
        for name in usable:
            if posixpath.basename(name) == "index.json":
                self._read_index(name)
        if not self._shards:
            raise UserError(f"{self._path}: no MDS index.json below it: check `sources.path`")

        # A shard that its index lists and that is not there is a unit too: its rows are lost, and counted.
        there = set(usable)
        if len(usable) < len(names):
            inventory.ignored[BAD_NAME] = len(names) - len(usable)
        inventory.units = {name: int(name in there) for name in self._shards}
        others = there - self._shards.keys()
        inventory.ignored["index.json"] = sum(posixpath.basename(name) == "index.json" for name in others)
        inventory.ignore(name for name in others if posixpath.basename(name) != "index.json")
        return inventory

    def _read_index(self, name: str) -> None:
        try:
            shards = json.loads(self._files.read(name))["shards"]
            for shard in shards:
                path = posixpath.join(posixpath.dirname(name), shard["raw_data"]["basename"])
                self._shards[path] = int(shard["samples"]), self._layout(name, shard)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RefusedError) as error:
            what = first_line(error)[:200]
            raise UserError(
                f"{self._path}/{name}: not an MDS index ({type(error).__name__}: {what}): "
                "write the dataset again"
            ) from error

    def _layout(self, name: str, shard: dict[str, Any]) -> RowLayout:
        where = f"{self._path}/{name}"
        # Images are read by their offset in the file, which a compressed shard does not have.
        codec = shard.get("compression")
        if shard["format"] != "mds" or codec:
            stored = shard["zip_data"] if codec else shard["raw_data"]
            form = f"compressed with {codec}" if codec else f"{shard['format']!r}, not MDS"
            raise UserError(
                f"{where}: shard {stored['basename']!r:.200} is {form:.200}: "
                "write the dataset again as MDS with compression=None"
            )
        layout = RowLayout(shard)
        encoding = layout.encodings.get(self._image)
        if encoding not in IMAGES:
            raise UserError(
                f"{where}: column {self._image!r} is {encoding!r}, not one of {IMAGES}: set `sources.image`"
            )
        return layout

    def version(self, name: str) -> str:
        """Return a text that is another one after the shard has changed."""
        return self._files.version(name)

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all rows of a shard; unreadable rows have that as their reason."""
        # A worker opens the source without listing its files first.
        if not self._shards:
            self.inventory()

        if name not in self._shards:
            raise FileNotFoundError(name)  # the index has been written again since the files were listed
        rows, layout = self._shards[name]
        done = possible = 0
        try:
            with self._files.open(name) as file:
                # Each row has an offset of 4 bytes, so the size bounds their number; an index may claim any.
                possible = min(rows, self._files.size(name) // 4)
                offsets = read_offsets(file, max_rows=possible)
                if len(offsets) - 1 != rows:
                    raise ValueError(f"{len(offsets) - 1} rows where the index says {rows}")

                for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                    key = f"{name}:{done}"
                    if end - start > MAX_ROW_BYTES:
                        yield Sample(key, reason=TOO_LARGE, detail=f"a row of {end - start} bytes")
                    else:
                        file.seek(start)
                        # Damaged offsets may decrease, and `read(-1)` would load the rest of the shard.
                        data = file.read(max(0, end - start))
                        yield self._sample(key, layout, data, start, columns)
                    done += 1
        except RefusedError as error:
            yield Sample(name, reason=error.reason, detail=error.detail)
        except (OSError, ValueError) as error:
            raise_unless_content(error)
            # Unreadable rows are counted as well, and at least one reports the fault.
            for number in range(done, max(possible, done + 1)):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _sample(self, key: str, layout: RowLayout, data: bytes, start: int, columns: Sequence[str]) -> Sample:
        try:
            spans = layout.spans(data, len(data))
            begin, end = spans[self._image]
            record: dict[str, Any] = {}
            for column in columns:
                # `meta.short` is a field of the column `meta`, unless there is a column of that very name.
                stored = column if column in spans else column.partition(".")[0]
                # Encodings such as pickle are left out, because reading them would run foreign code.
                if stored in spans and layout.encodings[stored] in VALUES:
                    record[stored] = decode(layout.encodings[stored], data[slice(*spans[stored])])
        except (ValueError, RecursionError) as error:
            return Sample(key, reason=UNREADABLE, detail=str(error)[:200])

        if begin == end:
            return Sample(key, record=record, reason=NO_IMAGE)
        return Sample(key, data[begin:end], record, Place(start + begin, end - begin))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images by ranged reads."""
        yield from self._files.fetch_ranges(name, places)
