"""The shards of a snapshot's parts: where they are in the store, and those that a process has open.

Both readers of a snapshot, our loader and `StreamingSnapshot`, open their files here.
"""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from data_prep.dataset.mds import Shard
from data_prep.dataset.schema import Family, Part, Snapshot
from data_prep.dataset.snapshot_reader import read_index
from data_prep.store.store import StoredFile, StoreError, hash_file
from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk, write_atomic
from pipeline.data.shard_cache import WAIT_SECONDS, CachedShard, ShardCache
from pipeline.data.threads import Threads
from pipeline.stage.config import DataConfig, cache_root
from pipeline.stage.corpus import Source, is_clip

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256
"""Files that a process keeps open, unless one batch needs more."""
_MAX_THREADS = 8

Place = tuple[int, int]
"""Number of a dataset, and of a part in its bucket."""


class PartIndex:
    """The parts of each bucket, and their files.

    All processes of a machine map its columns from one file per bucket.
    """

    def __init__(self, cache: ShardCache, snapshot: Snapshot) -> None:
        """Put the index files into the cache, unless another process did.

        Raises:
            StoreError: if an index is missing or damaged.
            UserError: if the disk is full.
        """
        self.paths: dict[str, Path] = {}
        for bucket, record in sorted(snapshot.buckets.items()):
            # The hash is in the name, so a file that is whole has the right content and is never rewritten.
            name = f"index/{bucket}-{record['index_xxh64']}"
            self.paths[bucket] = path = cache.folder / f"{name}.arrow"
            with naming_full_disk(path), cache.locked(name, WAIT_SECONDS) as is_held:
                if not is_held:
                    raise StoreError(f"{path}: another process has locked it for an hour: end that process")
                if not _is_whole(path):
                    _write_table(path, read_index(cache.dataset, snapshot, bucket).combine_chunks())

    def __getstate__(self) -> dict[str, Any]:
        # Mapped tables cannot be pickled; a loader process maps the files again, and shares their memory.
        return {"paths": self.paths}

    @cached_property
    def tables(self) -> dict[str, pyarrow.Table]:
        """Bucket -> table, mapped into memory."""
        files = {bucket: pyarrow.memory_map(str(path)) for bucket, path in self.paths.items()}
        return {bucket: pyarrow.ipc.open_file(file).read_all() for bucket, file in files.items()}

    def rows(self, bucket: str) -> NDArray[np.int64]:
        """Return the number of rows of each part of a bucket."""
        return self.tables[bucket].column("rows").to_numpy().astype(np.int64)

    def rows_of(self, bucket: str, part: int) -> int:
        """Return the number of rows of one part."""
        return int(self.tables[bucket].column("rows")[part].as_py())

    def part(self, bucket: str, part: int) -> tuple[Part, str]:
        """Return one part, and the hash of its sample ids."""
        table = self.tables[bucket]
        return Part(bucket, table.column("number")[part].as_py()), table.column("ids_xxh64")[part].as_py()

    def user(self, bucket: str, part: int, row: int) -> int:
        """Return the number of a row's user; -1 if it has none, or the snapshot has no users."""
        table = self.tables[bucket]
        if "users" not in table.column_names:
            return -1
        users: Any = table.column("users")[part]
        return users.values[row].as_py()

    @property
    def highest_user(self) -> int:
        """The highest number of a user; -1 if there are no users."""
        highest = -1
        for table in self.tables.values():
            if "users" in table.column_names:
                for chunk in table.column("users").chunks:
                    highest = max(highest, int(np.max(chunk.flatten().to_numpy(), initial=-1)))
        return highest

    def file(self, bucket: str, part: int, family: str) -> tuple[StoredFile, str]:
        """Return the payload of one part in a family, and its name in a cache."""
        table = self.tables[bucket]
        key, size, digest = (
            table.column(f"{family}.{name}")[part].as_py() for name in ("key", "bytes", "xxh64")
        )
        return StoredFile(key, size, digest), f"{family}/{bucket}/{table.column('number')[part].as_py():05d}"


def _write_table(path: Path, table: pyarrow.Table) -> None:
    """Write a table, and then its hash beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(path, durable=True) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    write_atomic(_hash_path(path), hash_file(path))


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh64")


def _is_whole(path: Path) -> bool:
    """True if a cached index is what was written: from a damaged one, rows would be read at wrong places."""
    try:
        return _hash_path(path).read_bytes() == hash_file(path).encode()
    except FileNotFoundError:
        return False


@dataclass
class DatasetFiles:
    """The payload files of one dataset of the corpus: the cache that fetches them, and their index."""

    cache: ShardCache
    index: PartIndex

    @classmethod
    def open(cls, source: Source, data: DataConfig) -> "DatasetFiles":
        """Set up the cache of a dataset, and put the index of its snapshot there.

        Raises:
            StoreError: if an index is missing or damaged.
            UserError: if the cache directory cannot be written, or the disk is full.
        """
        limit = None if data.cache_limit_gb is None else int(data.cache_limit_gb * 1e9)
        cache = ShardCache(source.dataset, cache_root(data), source.snapshot.id, limit)
        # Before anything is fetched: the leftovers of a killed job would count as used space.
        cache.clean()
        return cls(cache, PartIndex(cache, source.snapshot))

    def open_shard(self, bucket: str, part: int, family: Family) -> CachedShard:
        """Open the shard of a part in a family, once its file is on this machine and whole.

        Raises:
            StoreError: if the file cannot be fetched, is damaged, has not the part's number of rows, or is
                evicted again and again; the message names it.
            UserError: if the disk is full.
        """
        file, name = self.index.file(bucket, part, family.name)
        shard = self.cache.open(file, name, family.columns)
        # A file may be whole and still be of another version of the part, with other rows.
        if len(shard) != self.index.rows_of(bucket, part):
            raise StoreError(f"{shard.path}: families disagree on rows: take the snapshot again")
        return shard


class OpenShards:
    """The shards that a process has open; those used longest ago are closed first."""

    def __init__(self, sources: Sequence[DatasetFiles], families: Mapping[bool, Sequence[Family]]) -> None:
        """Open nothing yet.

        Args:
            sources: the datasets, by number.
            families: the families whose shards a part consists of: one of images (False), one of clips
                (True).
        """
        self.sources = list(sources)
        self._families: dict[bool, dict[str, Family]] = {}
        for clips, of_kind in families.items():
            self._families[clips] = {family.name: family for family in of_kind}
        self._open: OrderedDict[tuple[str, Place, str], CachedShard] = OrderedDict()
        self._threads: tuple[int, Threads] | None = None
        """Process that has started the threads which fetch ahead; and these."""

    def __getstate__(self) -> dict[str, Any]:
        # Threads and open files belong to one process; a loader process opens its own.
        return {**self.__dict__, "_threads": None, "_open": OrderedDict()}

    def families(self, bucket: str) -> dict[str, Family]:
        """Return the families of a bucket's parts by name."""
        return self._families[is_clip(bucket)]

    def open(self, bucket: str, places: Collection[Place]) -> dict[Place, dict[str, Shard]]:
        """Open the shards of parts; those that are not open yet are fetched in parallel.

        Args:
            bucket: the parts' bucket.
            places: the parts.

        Returns:
            Part -> family -> shard.

        Raises:
            StoreError: if a file cannot be fetched or is damaged; the message names it.
            UserError: if the disk is full.
        """
        keys = [(bucket, place, family) for place in sorted(places) for family in self.families(bucket)]
        missing = [key for key in keys if key not in self._open]
        if missing:
            # Chunks of 1, so that a slow download does not hold up files that another thread could fetch.
            with Threads(min(_MAX_THREADS, len(missing))) as pool:
                self._open.update(zip(missing, pool.map(self._open_shard, missing, 1), strict=True))

        shards: dict[Place, dict[str, Shard]] = {place: {} for place in places}
        for key in keys:
            self._open.move_to_end(key)
            # An open file can still be evicted by its age, which would cost a download when it is opened
            # again.
            self._open[key].touch()
            _, place, family = key
            shards[place][family] = self._open[key]

        # Never below what this batch needs: the caller still reads from those.
        while len(self._open) > max(MAX_OPEN_SHARDS, len(keys)):
            self._open.popitem(last=False)
        return shards

    def _open_shard(self, key: tuple[str, Place, str]) -> CachedShard:
        bucket, (source, part), family = key
        return self.sources[source].open_shard(bucket, part, self.families(bucket)[family])

    def fetch_ahead(self, bucket: str, places: Iterable[Place]) -> None:
        """Begin to fetch the shards of parts that will be needed soon; errors are only logged."""
        remote = [place for place in places if not self.sources[place[0]].cache.is_local]
        if not remote:
            return
        if self._threads is None or self._threads[0] != os.getpid():  # a fork does not copy threads
            self._threads = os.getpid(), Threads(2)
            weakref.finalize(self, self._threads[1].terminate)
        for source, part in remote:
            for family in self.families(bucket):
                self._threads[1].apply_async(self._fetch_quietly, (source, bucket, part, family))

    def _fetch_quietly(self, source: int, bucket: str, part: int, family: str) -> None:
        files = self.sources[source]
        try:
            # No waiting: if another process already fetches the file, there is nothing left to do here.
            files.cache.get(*files.index.file(bucket, part, family), wait_seconds=0.0)
        except UserError as error:
            # The reader that needs the part tries again, and raises.
            log.warning("ahead of its use: %s", error)


def disagree(left: Shard, right: Shard, what: str) -> StoreError:
    """Return the error of two families whose shards of one part are not about the same samples."""
    return StoreError(f"{left.path} and {right.path} hold other {what}: run `python -m data_prep verify`")
