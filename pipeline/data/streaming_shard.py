"""One part of a snapshot as one shard of mosaicml-streaming: each row with the columns of all families."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.format.mds.reader import MDSReader

from data_prep.dataset.schema import Family
from data_prep.store.store import StoreError
from pipeline.data.dataset import Files
from pipeline.data.shard_cache import touch
from pipeline.data.threads import Threads

Row = dict[str, Any]

_TRIES = 10


class JoinedReader(Reader):
    """One part as one streaming shard: the same rows of every family, in one file each."""

    def __init__(self, files: Files, families: Sequence[Family], bucket: str, part: int, rows: int) -> None:
        """Name a part; nothing is read yet.

        Args:
            files: the dataset's files.
            families: latents and texts.
            bucket: the part's bucket.
            part: its place in the snapshot's index of the bucket.
            rows: how many rows it has.
        """
        super().__init__(str(files.cache.folder), None, None, [], rows, None)
        self._files, self._families, self._bucket, self._part = files, families, bucket, part
        self._opened: list[MDSReader] | None = None
        self._touched = 0.0

    def prepare(self) -> list[MDSReader]:
        """The readers of all families, once their files are on this machine and whole.

        Raises:
            StoreError: a file cannot be had, is damaged, or belongs to other rows; the message names it.
            UserError: the disk is full.
        """
        if self._opened is None:
            with Threads(len(self._families)) as pool:
                self._opened = pool.map(self._open, self._families)
        if not self._files.cache.is_local:
            self._touched = max([touch(_path(reader), self._touched) for reader in self._opened])
        return self._opened

    def _open(self, family: Family) -> MDSReader:
        file, _ = self._files.index.file(self._bucket, self._part, family.name)
        shard = self._files.open(self._bucket, self._part, family.name, family.columns)
        path = shard.path
        if len(shard) != self.samples:
            raise StoreError(f"{path}: families disagree on rows: take the snapshot again")
        names = sorted(family.columns)
        return MDSReader(
            dirname=str(path.parent),
            split=None,
            column_encodings=[family.columns[name] for name in names],
            column_names=names,
            column_sizes=[8 if family.columns[name] == "int" else None for name in names],
            compression=None,
            hashes=["xxh64"],
            raw_data=FileInfo(path.name, file.bytes, {"xxh64": file.xxh64}),
            samples=self.samples,
            size_limit=None,
            zip_data=None,
        )

    def get_sample_data(self, idx: int) -> list[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The bytes of a row in each family's file.

        Raises:
            StoreError: as `prepare`, or the cache is too small to keep the file until it is read.
            UserError: the disk is full.
        """
        for _ in range(_TRIES):
            try:
                return [_stored(reader, idx) for reader in self.prepare()]
            except FileNotFoundError:
                self._opened = None  # evicted since
        file, _ = self._files.index.file(self._bucket, self._part, self._families[0].name)
        raise StoreError(f"{file.key}: evicted as soon as it is fetched: raise data.cache_limit_gb")

    def decode_sample(self, data: list[bytes]) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The row with the columns of all families.

        Raises:
            StoreError: a row is damaged, or the families hold other samples.
        """
        row: Row = {}
        readers = self._opened or self.prepare()
        for family, reader, stored in zip(self._families, readers, data, strict=True):
            variable = reader.column_sizes.count(None)
            fixed = sum(size for size in reader.column_sizes if size is not None)
            sizes = np.frombuffer(stored[: 4 * variable].ljust(4 * variable), "<u4")
            if len(stored) != 4 * variable + int(sizes.sum()) + fixed:  # which streaming would not notice
                raise _damaged(reader)
            columns = reader.decode_sample(stored)
            id = columns.pop("id")
            if id != row.setdefault("id", id):
                paths = f"{_path(readers[0])} and {_path(reader)}"
                raise StoreError(f"{paths} hold other sample ids: run `python -m data_prep verify`")
            row |= {f"{family.name}/{name}": value for name, value in columns.items()}
        return row


def _stored(reader: MDSReader, index: int) -> bytes:
    try:
        return reader.get_sample_data(index)
    except (IndexError, ValueError) as error:  # the file is too short for its own offsets
        raise _damaged(reader) from error


def _damaged(reader: MDSReader) -> StoreError:
    return StoreError(f"{_path(reader)}: a row is damaged: delete the file, or run `python -m data_prep verify`")


def _path(reader: MDSReader) -> Path:
    return Path(reader.dirname, reader.raw_data.basename)
