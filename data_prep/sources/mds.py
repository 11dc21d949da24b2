"""MDS folders (mosaicml-streaming's shards with an `index.json`) as a source, read by byte offset."""

import json
import posixpath
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import NO_IMAGE, UNREADABLE, Place, Sample
from model.common.errors import UserError

SCALARS = {"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
IMAGES = ("bytes", "jpeg", "png", "jpg")
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda data: data.decode("utf-8", "surrogateescape"),
    "str_int": lambda data: int(data),
    "str_float": lambda data: float(data),
    "int": lambda data: int(np.frombuffer(data, np.int64)[0]),
    "json": json.loads,
    **{name: lambda data, name=name: np.frombuffer(data, name)[0].item() for name in SCALARS},
}


class MDSSource:
    """Uncompressed MDS shards, local or in a bucket. A file of this source is a shard."""

    def __init__(self, source: SourceConfig) -> None:
        self._path = source.path
        self._files = SourceFiles(source.path)
        self._image = source.image
        self._shards: dict[str, dict[str, Any]] = {}

    def files(self) -> list[str]:
        """Shards that the index files below the path list.

        Raises:
            UserError: no index, compressed shards, or an image column that does not hold image files.
        """
        indexes = [name for name in self._files.names() if posixpath.basename(name) == "index.json"]
        for name in indexes:
            try:
                shards = json.loads(self._files.read(name))["shards"]
                for shard in shards:
                    self._check(name, shard)
                    self._shards[posixpath.join(posixpath.dirname(name), shard["raw_data"]["basename"])] = shard
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path}/{name}: not an MDS index ({error!r}): write the dataset again") from error
        if not self._shards:
            raise UserError(f"{self._path}: no MDS index.json below it: check `sources.path`")
        return sorted(self._shards)

    def _check(self, name: str, shard: dict[str, Any]) -> None:
        where = f"{self._path}/{name}"
        if shard["format"] != "mds" or shard.get("compression"):
            raise UserError(f"{where}: only uncompressed MDS shards are read here: write them with compression=None")
        encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        if encodings.get(self._image) not in IMAGES:
            raise UserError(
                f"{where}: column {self._image!r} is {encodings.get(self._image)!r}, not one of {IMAGES}: set `sources.image`"
            )

    def read(self, name: str, columns: Sequence[str]) -> Iterator[Sample]:
        """All rows of a shard; a damaged one gives what can be read, and the rest as dropped rows."""
        if not self._shards:
            self.files()
        shard = self._shards[name]
        done, rows = 0, int(shard["samples"])
        try:
            with self._files.open(name) as file:
                count = struct.unpack("<I", file.read(4))[0]
                if count != rows:
                    raise ValueError(f"{count} rows where the index says {rows}")
                offsets = np.frombuffer(file.read(4 * (count + 1)), "<u4")
                for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                    file.seek(start)
                    yield self._sample(f"{name}:{done}", shard, file.read(max(0, end - start)), start, columns)
                    done += 1
        except (OSError, ValueError, struct.error) as error:
            for number in range(done, max(rows, done + 1)):
                yield Sample(f"{name}:{number}", reason=UNREADABLE, detail=str(error)[:200])

    def _sample(self, key: str, shard: dict[str, Any], data: bytes, start: int, columns: Sequence[str]) -> Sample:
        try:
            fields = _split_row(shard, data)
            begin, end = fields[self._image]
            encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            record = {
                column: DECODERS[encodings[column]](data[slice(*fields[column])])
                for column in columns
                if column in fields and encodings[column] in DECODERS
            }
        except (ValueError, struct.error, IndexError, RecursionError) as error:
            return Sample(key, reason=UNREADABLE, detail=str(error)[:200])
        if begin == end:
            return Sample(key, record=record, reason=NO_IMAGE)
        return Sample(key, data[begin:end], record, Place(start + begin, end - begin))

    def fetch(self, name: str, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Images by ranged reads."""
        yield from self._files.fetch(places, lambda place: self._files.read_range(name, place.offset, place.length))


def _split_row(shard: dict[str, Any], data: bytes) -> dict[str, tuple[int, int]]:
    """Begin and end of each column in a row: sizes of the variable columns come first, then the values in order.

    Raises:
        ValueError: the sizes do not fit the row.
    """
    sizes = shard["column_sizes"]
    variable = sum(size is None for size in sizes)
    lengths = iter(struct.unpack_from(f"<{variable}I", data))
    position, found = 4 * variable, {}
    for column, size in zip(shard["column_names"], sizes, strict=True):
        length = next(lengths) if size is None else size
        found[column] = (position, position + length)
        position += length
    if position != len(data):
        raise ValueError(f"row of {len(data)} bytes where its columns need {position}")
    return found
