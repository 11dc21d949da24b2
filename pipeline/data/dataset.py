"""From planned rows to a packed batch: what a loader process does. Bytes go from the files straight into the batch's block."""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.dataset.schema import Bucket, Family, Part, Snapshot
from data_prep.dataset.snapshot_reader import read_captions, read_index
from data_prep.store.store import StoredFile, StoreError
from model.common.errors import UserError
from model.common.files import atomic_path, naming_full_disk
from model.encoders.quantize import bytes_per_token
from pipeline.data.batch import Layout, PackedBatch, allocate, tensors_in
from pipeline.data.epoch_plan import sample_rng
from pipeline.data.mixture import Draws
from pipeline.data.shard_cache import Row, Shard, ShardCache
from pipeline.data.threads import Threads

log = logging.getLogger(__name__)

_OPEN_SHARDS = 256
"""Files, and parts' captions, that a loader process keeps at hand."""
_WAIT_SECONDS = 3600.0


@dataclass(frozen=True)
class Request:
    """What the trainer asks a loader process for: this rank's rows of one global batch."""

    draws: Draws
    epoch: int
    index: int
    seeds: tuple[int, ...]
    """One for each dataset's samples."""
    last: bool = False
    """Whether it is the last of its epoch."""
    ahead: tuple[tuple[int, int], ...] = ()
    """Datasets and parts of the bucket that will be needed soon."""
    drop: bool = True
    """Whether captions are dropped; not for validation."""


class PartIndex:
    """Where the parts of each bucket lie: columns that all processes of a machine map from one file each."""

    def __init__(self, cache: ShardCache, snapshot: Snapshot) -> None:
        """Put the index files into the cache unless another process did.

        Raises:
            StoreError: an index is missing or damaged.
            UserError: the disk is full.
        """
        self.paths: dict[str, Path] = {}
        for bucket, record in sorted(snapshot.buckets.items()):
            name = f"index/{bucket}-{record['index_xxh64']}"
            self.paths[bucket] = path = cache.folder / f"{name}.arrow"
            with naming_full_disk(path), cache.locked(name, _WAIT_SECONDS) as held:
                if not held:
                    raise StoreError(f"{path}: another process holds its lock for an hour: end it")
                if not path.exists():
                    table = read_index(cache.dataset, snapshot, bucket).combine_chunks()
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_path(path, durable=True) as temporary, temporary.open("wb") as file:
                        with pyarrow.ipc.new_file(file, table.schema) as writer:
                            writer.write_table(table)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    @cached_property
    def tables(self) -> dict[str, pyarrow.Table]:
        """Bucket -> table, mapped into memory."""
        return {bucket: pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all() for bucket, path in self.paths.items()}

    def rows(self, bucket: str) -> NDArray[np.int64]:
        """Rows of each part of a bucket."""
        return self.tables[bucket].column("rows").to_numpy().astype(np.int64)

    def part(self, bucket: str, part: int) -> tuple[Part, str]:
        """One part, and the hash of its sample ids."""
        table = self.tables[bucket]
        return Part(bucket, table.column("number")[part].as_py()), table.column("ids_xxh64")[part].as_py()

    def file(self, bucket: str, part: int, family: str) -> tuple[StoredFile, str]:
        """Payload of one part, and its name in a cache."""
        table = self.tables[bucket]
        key, size, digest = (table.column(f"{family}.{name}")[part].as_py() for name in ("key", "bytes", "xxh64"))
        return StoredFile(key, size, digest), f"{family}/{bucket}/{table.column('number')[part].as_py():05d}"


@dataclass
class CaptionChoice:
    """How a sample's caption is drawn."""

    kinds: list[str]
    """The dataset's kinds of captions; shards hold indices into this list."""
    weights: dict[str, float]
    """Kind -> weight; empty = all captions alike; kinds that are not named are not drawn."""
    drop: float
    """Share of samples that get the null caption."""

    def __post_init__(self) -> None:
        if any(weight < 0 for weight in self.weights.values()) or (self.weights and not any(self.weights.values())):
            raise UserError("data.caption_weights: give weights that are not negative, and at least one above 0")

    def draw(self, rng: np.random.Generator, kinds: NDArray[np.uint8], drops: bool) -> int | None:
        """Index of the sample's caption among those it has; None = the null caption."""
        dropped, which = rng.random(2)
        if not len(kinds) or (drops and dropped < self.drop):
            return None
        shares = np.ones(len(kinds))
        if self.weights:
            # A kind's weight is shared by the sample's captions of that kind.
            present = np.bincount(kinds, minlength=len(self.kinds))
            shares = np.array([self.weights.get(self.kinds[kind], 0.0) / present[kind] for kind in kinds])
            if not shares.any():
                shares = np.ones(len(kinds))
        limits = np.cumsum(shares)
        return int(np.searchsorted(limits, which * limits[-1], side="right"))


@dataclass
class Files:
    """One dataset's files: where they are, where parts lie in them, and how captions are drawn from its kinds."""

    cache: ShardCache
    index: PartIndex
    captions: CaptionChoice

    def open(self, bucket: str, part: int, family: str, columns: dict[str, str]) -> Shard:
        """The shard of a part in a family, once its file is on this machine and whole.

        Raises:
            StoreError: it cannot be had, is damaged, or is evicted again and again; the message names it.
            UserError: the disk is full.
        """
        file, place = self.index.file(bucket, part, family)
        for _ in range(10):
            path = self.cache.get(file, place, _WAIT_SECONDS)
            if path is None:
                raise StoreError(f"{file.key}: another process has been fetching it for an hour: end it")
            try:
                return Shard(path, columns)
            except FileNotFoundError:
                continue  # evicted between the two steps
        raise StoreError(f"{file.key}: evicted as soon as it is fetched: raise data.cache_limit_gb")


class SnapshotDataset(Dataset[PackedBatch | Exception]):
    """Rows of one or more snapshots, batch by batch. Map-style: an item is a whole `Request`."""

    def __init__(self, sources: Sequence[Files], latents: Family, texts: Sequence[Family], reads_captions: bool) -> None:
        """Read these families.

        Args:
            sources: the datasets, by number.
            latents: the latents family.
            texts: text families.
            reads_captions: put the captions of the pairs themselves into the batch, where there are no text families.
        """
        self.sources, self.reads_captions = list(sources), reads_captions
        self.latents, self.texts = latents, list(texts)
        self.families = [latents, *texts]
        self._columns = {family.name: family.columns for family in self.families}
        self._open: OrderedDict[tuple[int, str, int, str], Shard] = OrderedDict()
        self._ahead: tuple[int, Threads] | None = None
        self._captions: OrderedDict[tuple[int, str, int], dict[int, list[tuple[int, str]]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_open": OrderedDict()}

    def __getitem__(self, request: Request) -> PackedBatch | Exception:
        """Read a batch; what the user can put right is returned, not raised, so that it keeps its one line."""
        try:
            self.fetch_ahead(request)
            return self._read(request)
        except UserError as error:
            return error

    def fetch_ahead(self, request: Request) -> None:
        """Begin to fetch what a request names as needed soon."""
        wanted = [
            (source, request.draws.bucket, part, family.name)
            for source, part in request.ahead
            if not self.sources[source].cache.is_local
            for family in self.families
        ]
        if not wanted:
            return
        if self._ahead is None or self._ahead[0] != os.getpid():  # threads do not come along over a fork
            self._ahead = os.getpid(), Threads(2)
            weakref.finalize(self, self._ahead[1].terminate)
        for place in wanted:
            self._ahead[1].apply_async(self._fetch_quietly, place)

    def _fetch_quietly(self, source: int, bucket: str, part: int, family: str) -> None:
        files = self.sources[source]
        try:
            files.cache.get(*files.index.file(bucket, part, family), wait_seconds=0.0)
        except UserError as error:
            log.warning("ahead of its use: %s", error)  # whoever needs the part tries again, and raises

    def _shards(self, bucket: str, parts: Sequence[tuple[int, int]]) -> dict[tuple[int, int, str], Shard]:
        """The shards that hold `parts` of datasets, of each family; those that are not here are fetched side by side."""
        names = [family.name for family in self.families]
        found: dict[tuple[int, int, str], Shard] = {}
        missing = []
        for source, part in parts:
            for name in names:
                shard = self._open.get((source, bucket, part, name))
                if shard is None:
                    missing.append((source, part, name))
                else:
                    self._open.move_to_end((source, bucket, part, name))
                    found[source, part, name] = shard
        if missing:
            with Threads(min(8, len(missing))) as pool:
                opened = dict(zip(missing, pool.map(lambda key: self._shard(bucket, *key), missing, 1), strict=True))
            found |= opened
            self._open |= {(source, bucket, part, name): shard for (source, part, name), shard in opened.items()}
        for (source, _, _), shard in found.items():
            if not self.sources[source].cache.is_local:  # a store's own files may be another user's
                shard.touch()
        for source, part in parts:
            rows = {len(found[source, part, name]) for name in names}
            if rows != {int(self.sources[source].index.tables[bucket].column("rows")[part].as_py())}:
                path = found[source, part, self.latents.name].path
                raise StoreError(f"{path}: families disagree on rows: take the snapshot again")
        while len(self._open) > max(_OPEN_SHARDS, len(found)):
            self._open.popitem(last=False)
        return found

    def _shard(self, bucket: str, source: int, part: int, name: str) -> Shard:
        return self.sources[source].open(bucket, part, name, self._columns[name])

    def _read(self, request: Request) -> PackedBatch:
        draws = request.draws
        sources, passes, parts, numbers = (column.tolist() for column in (draws.sources, draws.passes, draws.parts, draws.rows))
        batch, places = len(numbers), list(zip(sources, parts, strict=True))
        shards = self._shards(draws.bucket, sorted(set(places)))
        rows = {
            family.name: [shards[*place, family.name].row(row) for place, row in zip(places, numbers, strict=True)]
            for family in self.families
        }
        ids = _same(rows, lambda row: row.id, "sample ids")
        keys = [(request.seeds[source], turn, id) for source, turn, id in zip(sources, passes, ids, strict=True)]
        written = self._written_captions(draws.bucket, places, ids) if self.reads_captions else None
        chosen = self._choose_captions(request, rows, keys, written)

        shape = (batch, *self._latent_shape(draws.bucket))
        layout: Layout = [(name, torch.int64, (batch,)) for name in ("ids", "sources", "passes")]
        layout += [("u", torch.float32, (batch,)), *((name, torch.bfloat16, shape) for name in ("mean", "std"))]
        spans = {family.name: [_span(row, k) for row, k in zip(rows[family.name], chosen, strict=True)] for family in self.texts}
        for family in self.texts:
            total = sum(length for _, length in spans[family.name])
            quantised = str(family.info["quantisation"])
            layout += [
                (f"{family.name}/values", torch.uint8, (total, bytes_per_token(quantised, int(family.info["width"])))),
                (f"{family.name}/scales", torch.float32, (0 if quantised == "bf16" else total,)),
                (f"{family.name}/lengths", torch.int32, (batch,)),
            ]
        memory = allocate(layout)
        tensors = tensors_in(memory, layout)
        copies = _latent_copies(rows[self.latents.name], tensors)
        for family in self.texts:
            copies += _text_copies(family, rows[family.name], spans[family.name], tensors)
        for shard, start, target in copies:
            shard.announce(start, len(target))
        for name, values in (("ids", ids), ("sources", sources), ("passes", passes)):
            tensors[name][:] = torch.tensor(values)
        uniform = [sample_rng(*key, "timestep").random(dtype=np.float32) for key in keys]
        tensors["u"][:] = torch.tensor(np.array(uniform))
        for shard, start, target in copies:
            shard.read_into(start, target)
        counts = {name: [length for _, length in spans[name]] for name in spans}
        for name, lengths in counts.items():
            tensors[f"{name}/lengths"][:] = torch.tensor(lengths, dtype=torch.int32)
        captions = None
        if written is not None:
            captions = ["" if k is None else there[k][1] for there, k in zip(written, chosen, strict=True)]
        return PackedBatch(
            draws.bucket, request.epoch, request.index, request.last, memory, layout, request.seeds, counts, captions
        )  # fmt: skip

    def _written_captions(
        self, bucket: str, places: Sequence[tuple[int, int]], ids: Sequence[int]
    ) -> list[list[tuple[int, str]]]:
        """Kinds and texts of each sample's captions, from the pairs."""
        for source, part in set(places):
            key = source, bucket, part
            if key not in self._captions:
                files = self.sources[source]
                self._captions[key] = read_captions(files.cache.dataset, *files.index.part(bucket, part))
            self._captions.move_to_end(key)
        found = [self._captions[source, bucket, part][id] for (source, part), id in zip(places, ids, strict=True)]
        while len(self._captions) > _OPEN_SHARDS:
            self._captions.popitem(last=False)
        return found

    def _choose_captions(
        self,
        request: Request,
        rows: dict[str, list[Row]],
        keys: Sequence[tuple[int, int, int]],
        written: list[list[tuple[int, str]]] | None,
    ) -> list[int | None]:
        """Caption of each sample, the same in every text family; None = the null caption."""
        if written is not None:
            kinds = [bytes(kind for kind, _ in there) for there in written]
        elif self.texts:
            texts = {family.name: rows[family.name] for family in self.texts}
            kinds = _same(texts, lambda row: row.read("kinds"), "captions")
        else:
            return []
        return [
            self.sources[source].captions.draw(sample_rng(*key, "caption"), np.frombuffer(there, np.uint8), request.drop)
            for source, key, there in zip(request.draws.sources.tolist(), keys, kinds, strict=True)
        ]

    def _latent_shape(self, bucket: str) -> tuple[int, int, int]:
        size, info = Bucket.parse(bucket), self.latents.info
        down = int(info["downsampling"])
        return int(info["channels"]), size.height // down, size.width // down


Copy = tuple[Shard, int, memoryview]
"""File, position in it, and where its bytes go."""


def _same(rows: dict[str, list[Row]], read: Callable[[Row], Any], what: str) -> list[Any]:
    """What `read` gives for each row, the same in every family."""
    (first, *others) = rows.values()
    values = [read(row) for row in first]
    for other in others:
        for value, left, right in zip(values, first, other, strict=True):
            if read(right) != value:
                raise StoreError(f"{left.shard.path} and {right.shard.path} hold other {what}: run `python -m data_prep verify`")
    return values


def _span(row: Row, caption: int | None) -> tuple[int, int]:
    """First token of a caption among the row's tokens, and its number of tokens."""
    if caption is None:
        return 0, 0
    tokens = np.frombuffer(row.read("tokens"), "<i4")
    return int(tokens[:caption].sum()), int(tokens[caption])


def _copy(row: Row, column: str, start: int, target: Tensor, size: int | None = None) -> Copy:
    """The column's bytes from `start` on, into a contiguous tensor; `size` is what the whole column must have."""
    at, there = row.column(column)
    view = target.view(torch.uint8).numpy().reshape(-1).data
    if there != (len(view) if size is None else size):
        raise StoreError(f"{row.shard.path}: `{column}` of sample {row.id} has {there} bytes: run `python -m data_prep verify`")
    return row.shard, at + start, view


def _latent_copies(rows: Sequence[Row], tensors: dict[str, Tensor]) -> list[Copy]:
    return [_copy(row, name, 0, tensors[name][place]) for name in ("mean", "std") for place, row in enumerate(rows)]


def _text_copies(family: Family, rows: Sequence[Row], spans: Sequence[tuple[int, int]], tensors: dict[str, Tensor]) -> list[Copy]:
    copies, filled = [], 0
    values, scales = tensors[f"{family.name}/values"], tensors[f"{family.name}/scales"]
    for row, (first, length) in zip(rows, spans, strict=True):
        if length:
            total = int(np.frombuffer(row.read("tokens"), "<i4").sum())
            width = values.shape[1]
            copies.append(_copy(row, "values", first * width, values[filled : filled + length], total * width))
            if len(scales):
                copies.append(_copy(row, "scales", first * 4, scales[filled : filled + length], total * 4))
            filled += length
    return copies
