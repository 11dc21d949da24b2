"""MDS folders (mosaicml-streaming's shards with an `index.json`) as a source, read by byte offset."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.config import SourceConfig
from data_prep.dataset.mds import FIXED, VARIABLE, RowLayout, decode, read_offsets
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import NO_IMAGE, UNREADABLE, Place, Sample
from model.common.errors import UserError

IMAGES = ("bytes", "jpeg", "png", "jpg")
VALUES = {*FIXED, *VARIABLE}.difference(IMAGES)
"""Encodings of columns that a record can hold."""


class MDSSource:
    """Uncompressed MDS shards, local or in a bucket. A file of this source is a shard."""

    def __init__(self, source: SourceConfig) -> None:
        self._path = source.path
        self._files = SourceFiles(source.path)
        self._image = source.image
        self._shards: dict[str, tuple[int, RowLayout]] = {}
        """Shard -> number of its rows, and their layout, both from the index."""

    def files(self) -> list[str]:
        """Return the shards that the index files below the path list.

        Raises:
            UserError: if there is no index, a shard is compressed, or the image column has no image files.
        """
        # The indexes describe the columns of all shards, so no shard is opened here.
        indexes = [name for name in self._files.names() if posixpath.basename(name) == "index.json"]
        for name in indexes:
            try:
                shards = json.loads(self._files.read(name))["shards"]
                for shard in shards:
                    path = posixpath.join(posixpath.dirname(name), shard["raw_data"]["basename"])
                    self._shards[path] = int(shard["samples"]), self._layout(name, shard)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}/{name}: not an MDS index ({error!r}): write the dataset again"
                ) from error

        if not self._shards:
            raise UserError(f"{self._path}: no MDS index.json below it: check `sources.path`")
        return sorted(self._shards)

    def _layout(self, name: str, shard: dict[str, Any]) -> RowLayout:
        where = f"{self._path}/{name}"
        # Images are read by their offset in the file, which a compressed shard does not have.
        if shard["format"] != "mds" or shard.get("compression"):
            raise UserError(
                f"{where}: only uncompressed MDS shards are read here: write them with compression=None"
            )
        layout = RowLayout(shard)
        encoding = layout.encodings.get(self._image)
        if encoding not in IMAGES:
            raise UserError(
                f"{where}: column {self._image!r} is {encoding!r}, not one of {IMAGES}: set `sources.image`"
            )
        return layout

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """Yield all rows of a shard; unreadable rows have that as their reason."""
        # A worker opens the source without listing its files first.
        if not self._shards:
            self.files()

        rows, layout = self._shards[name]
        done = 0
        try:
            with self._files.open(name) as file:
                offsets = read_offsets(file, max_rows=rows)
                if len(offsets) - 1 != rows:
                    raise ValueError(f"{len(offsets) - 1} rows where the index says {rows}")

                for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                    file.seek(start)
                    # Damaged offsets may decrease, and `read(-1)` would load the rest of the shard.
                    yield self._sample(
                        f"{name}:{done}", layout, file.read(max(0, end - start)), start, columns
                    )
                    done += 1
        except (OSError, ValueError) as error:
            # Unreadable rows are counted as well, and at least one reports the fault.
            for number in range(done, max(rows, done + 1)):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _sample(self, key: str, layout: RowLayout, data: bytes, start: int, columns: Sequence[str]) -> Sample:
        try:
            spans = layout.spans(data, len(data))
            begin, end = spans[self._image]
            # Encodings such as pickle are left out, because reading them would run foreign code.
            record = {
                column: decode(layout.encodings[column], data[slice(*spans[column])])
                for column in columns
                if column in spans and layout.encodings[column] in VALUES
            }
        except (ValueError, RecursionError) as error:
            return Sample(key, reason=UNREADABLE, detail=str(error)[:200])

        if begin == end:
            return Sample(key, record=record, reason=NO_IMAGE)
        return Sample(key, data[begin:end], record, Place(start + begin, end - begin))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images by ranged reads."""
        yield from self._files.fetch(
            places, lambda place: self._files.read_range(name, place.offset, place.length)
        )
