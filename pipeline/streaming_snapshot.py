"""A stage's snapshots as a dataset of mosaicml-streaming, for trainers that are built on that. The only file that imports it.

    dist.init_process_group(...)  # where there are several processes
    dataset = StreamingSnapshot(load_stage("li_dit_1b_256", ["data.store=s3://bucket/prefix"]))
    loader = DataLoader(dataset, dataset.batch_size, num_workers=8, collate_fn=...)

A part is one streaming shard: a row joins the columns of all families of the stage, as they are stored, under
`family/column`, beside the sample's `id`. Order, batches and files are those of our own loader (`loader.py`): each step has one
bucket on all ranks, on any number of them, and every file is checked before it is read. Where streaming 0.13 would go on without
data, or wait for ever, this raises. Its plan of an epoch takes 8 bytes a sample, and a part costs each process a kilobyte: from
about a hundred million samples on, our own loader is the one to use.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import SharedMemory, _get_path
from streaming.base.world import World
from torch.utils.data import get_worker_info

from data_prep.schema import Family
from data_prep.store import StoreError
from model.errors import UserError
from pipeline.config import StageConfig, cache_root
from pipeline.dataset import Files
from pipeline.loader import TrainingData, end_with_trainer
from pipeline.mixture import Draws
from pipeline.position import Position
from pipeline.shard_cache import Shard, touch
from pipeline.streaming_leftovers import JobFolder

log = logging.getLogger(__name__)

Row = dict[str, Any]

_PLANNED = "planned"
_WAIT_SECONDS = 3600.0
_TRIES = 10
_FAILURE_BYTES = 4096


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
        for _ in range(_TRIES):
            if (opened := self._opened) is None:
                with ThreadPoolExecutor(len(self._families), thread_name_prefix="fetch") as pool:
                    opened = self._opened = list(pool.map(self._open, self._families))
            try:
                if not self._files.cache.is_local:
                    self._touched = max([touch(_path(reader), self._touched) for reader in opened])
                return opened
            except FileNotFoundError:
                self._opened = None  # evicted since
        raise self._evicted()

    def _open(self, family: Family) -> MDSReader:
        file, name = self._files.index.file(self._bucket, self._part, family.name)
        path = self._files.cache.get(file, name, _WAIT_SECONDS)
        if path is None:
            raise StoreError(f"{file.key}: another process has been fetching it for an hour: end it")
        if len(Shard(path, family.columns)) != self.samples:
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

    def _evicted(self) -> StoreError:
        file, _ = self._files.index.file(self._bucket, self._part, self._families[0].name)
        return StoreError(f"{file.key}: evicted as soon as it is fetched: raise data.cache_limit_gb")

    def get_sample_data(self, idx: int) -> list[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The bytes of a row in each family's file."""
        for _ in range(_TRIES):
            try:
                return [reader.get_sample_data(idx) for reader in self._opened or self.prepare()]
            except FileNotFoundError:
                self._opened = None
        raise self._evicted()

    def decode_sample(self, data: list[bytes]) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The row with the columns of all families.

        Raises:
            StoreError: the families hold other samples.
        """
        readers = self._opened or self.prepare()
        rows = [reader.decode_sample(part) for reader, part in zip(readers, data, strict=True)]
        ids = [row.pop("id") for row in rows]
        if len(set(ids)) > 1:
            paths = " and ".join(str(_path(reader)) for reader in readers)
            raise StoreError(f"{paths} hold other sample ids: run `python -m data_prep verify`")
        named = zip(self._families, rows, strict=True)
        return {"id": ids[0]} | {f"{family.name}/{name}": value for family, row in named for name, value in row.items()}


def _path(reader: MDSReader) -> Path:
    return Path(reader.dirname, reader.raw_data.basename)


class _BucketStream(Stream):
    """The parts of one bucket of one dataset. Its index is the snapshot's, its cache the one that our loader uses too."""

    def __init__(self, local: Path, files: Files, families: Sequence[Family], bucket: str, parts: NDArray[np.int64]) -> None:
        super().__init__(local=str(local))
        self._shards = [
            JoinedReader(files, families, bucket, part, rows) for part, rows in enumerate(parts.tolist()) if rows
        ]  # fmt: skip

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The parts that have rows."""
        return list(self._shards)

    def get_index_size(self) -> int:
        """Nothing: the index is not in streaming's own cache."""
        return 0

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Take no file that lies there for granted: each process checks what it reads."""
        cache_usage_per_shard[:] = 0


class StreamingSnapshot(StreamingDataset):
    """The samples of a stage, batch by batch in the order of our own loader, as rows of stored columns."""

    def __init__(self, stage: StageConfig, predownload: int | None = None) -> None:
        """Open the snapshots and plan; on every rank, with the same settings.

        Args:
            stage: what to read: data, families, global batch. Its batches all have one size.
            predownload: samples whose files each loader process fetches ahead; None = those of eight batches.

        Raises:
            UserError: what the stage reads is missing or does not fit, or cannot be given as streaming's rows.
        """
        world = World.detect()
        if world.num_ranks > 1 and not dist.is_initialized():
            raise UserError("several processes: call torch.distributed.init_process_group before StreamingSnapshot")
        if stage.data.tokens_per_batch is not None or stage.fusion.encode == "online":
            raise UserError(
                "streaming's batches have one size, and rows no captions: leave data.tokens_per_batch empty and "
                "fusion.encode=families, or use pipeline.loader"
            )
        self.data = TrainingData(stage, world.rank, world.num_ranks, torch.device("cpu"))
        self._folder = JobFolder(cache_root(stage.data))
        streams: list[Stream] = []
        starts: dict[tuple[int, str], NDArray[np.int64]] = {}
        at = 0
        for source, (files, dataset) in enumerate(zip(self.data.dataset.sources, self.data.parts, strict=True)):
            for bucket, rows in sorted(dataset.items()):
                if rows.any():
                    local = self._folder.path / f"{source}-{bucket}"
                    streams.append(_BucketStream(local, files, self.data.dataset.families, bucket, rows))
                    starts[source, bucket] = at + np.cumsum(rows) - rows
                    at += int(rows.sum())
        self._starts = starts
        super().__init__(streams=streams, batch_size=stage.global_batch // world.num_ranks, predownload=predownload)
        self.batching_method = _PLANNED  # which the constructor does not know
        self.length = len(self.data.plan(0)) * stage.global_batch // world.num_ranks
        # Streaming's locks lie where they go with the job, not in the machine's folder for temporary files.
        self._shared_barrier.filelock_path = str(self._folder.path / "barrier")
        self._cache_filelock_path = str(self._folder.path / "cache")
        self._failure = SharedMemory(_get_path(self._shm_prefix_int, "failure"), size=_FAILURE_BYTES)
        self._error: BaseException | None = None
        self._ends_with_trainer = False

    def work(self, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch from a place in it on.

        Returns:
            [nodes, ranks of a node, workers of a rank, batches of a worker, samples of a batch]; -1 = none.
        """
        size = self.data.stage.global_batch
        batches = [self._samples(draws) for draws in self.data.draws(epoch, sample_in_epoch // size)]
        rounds = -(-len(batches) // world.workers_per_rank)
        ids = np.full((rounds, world.workers_per_rank, world.num_nodes, world.ranks_per_node, size // world.num_ranks), -1)
        ids.reshape(-1, size)[: len(batches)] = np.array(batches, np.int64).reshape(-1, size)
        return ids.transpose(2, 3, 1, 0, 4)

    def _samples(self, draws: Draws) -> NDArray[np.int64]:
        """Streaming's numbers of a batch's rows: all rows counted through, stream by stream."""
        ids = draws.rows.copy()
        for source in np.unique(draws.sources).tolist():
            mine = draws.sources == source
            ids[mine] += self._starts[source, draws.bucket][draws.parts[mine]]
        return ids

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Bring a part's files here, whole; every process by itself, so that none waits for one that has failed.

        Raises:
            StoreError: a file cannot be had in spite of all retries, or is damaged.
            UserError: the disk is full.
        """
        self.shards[shard_id].prepare()
        self._shard_states[shard_id] = _ShardState.LOCAL

    def on_exception(self, future: Future) -> None:
        """End this process's iteration for what a thread of it met."""
        error = future.exception()
        if error is not None:
            self._tell(error)
            self._event.set()
            self._iterator.on_exit()  # the thread did not, and the end of the epoch waits for it

    def _tell(self, error: BaseException) -> None:
        """Leave the error where the other processes of the machine look for one."""
        self._error = error
        text = " ".join(str(error).split()).encode()[: _FAILURE_BYTES - 2]
        self._failure.buf[1 : 1 + len(text)] = text
        self._failure.buf[0] = 1

    def _raise_failure(self) -> None:
        if isinstance(self._error, UserError):
            raise self._error.with_traceback(None) from None  # a DataLoader would print the rest before the line that says it
        if self._error is not None:
            raise self._error
        if self._failure.buf[0]:
            text = bytes(self._failure.buf[1:]).rstrip(b"\0").decode(errors="replace")
            raise StoreError(f"{text} (another process of this machine)")

    def __iter__(self) -> Iterator[Row]:
        """This process's samples of the next epoch.

        Raises:
            StoreError: a file cannot be had or is damaged, here or in another process of the machine; the message names it.
            UserError: the disk is full.
        """
        if get_worker_info() is not None and not self._ends_with_trainer:
            end_with_trainer()
            self._ends_with_trainer = True
        self._raise_failure()
        try:
            for sample in super().__iter__():
                self._raise_failure()
                yield sample
        except RuntimeError:
            self._raise_failure()  # streaming's own message says only that there was one
            raise
        except UserError as error:
            self._tell(error)
        self._raise_failure()  # after one, streaming ends an epoch as if it were complete

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on; as streaming's, with the position that our loader saves.

        Raises:
            UserError: `num_samples` is no whole number of global batches.
        """
        state = super().state_dict(num_samples, from_beginning)
        size = self.data.stage.global_batch
        if state["sample_in_epoch"] % size:
            raise UserError(
                f"{state['sample_in_epoch']} samples are not whole batches of {size}: StreamingDataLoader counts them by the "
                "first value of a batch, which must have one entry a sample"
            )
        return state | {"position": self.data.position(state["epoch"], state["sample_in_epoch"] // size).to_dict()}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks and workers.

        Raises:
            UserError: the position is inside an epoch whose order is another now.
        """
        position = Position.from_dict(obj["position"])
        position.check(self.data.position(position.epoch, position.batch))
        super().load_state_dict({name: value for name, value in obj.items() if name != "position"})


batching_methods[_PLANNED] = StreamingSnapshot.work  # pyright: ignore[reportArgumentType]
