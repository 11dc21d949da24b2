"""A stage's snapshots for trainers that are built on mosaicml-streaming.

    dataset = StreamingSnapshot(load_stage("li_dit_1b_256", ["data.store=s3://bucket/prefix"]))
    for batch in SnapshotLoader(dataset, num_workers=8, collate_fn=...):

A part is one streaming shard: a row joins the columns of all families of the stage, as they are stored, under `family/column`,
beside the sample's `id`. Order, batches, cache and position are those of our own loader (`loader.py`): each step has one bucket
on all ranks, on any number of them, every file is checked before it is read, and an epoch goes on where it stopped.

To its users this is a StreamingDataset with a StreamingDataLoader, and streaming reads and decodes the rows. How streaming 0.13
shares work does not come along: shared memory that outlives a kill and meets the next job, barriers that wait for processes that
have failed, 8 bytes of plan a sample. Each process works out its rows from the plan by itself, and the ranks only agree, batch
by batch, that none has failed.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from streaming import StreamingDataLoader, StreamingDataset
from torch.utils.data import get_worker_info

from data_prep.store.store import StoreError
from model.common.errors import UserError
from pipeline.data.loader import TrainingData, become_loader_process
from pipeline.data.position import Position
from pipeline.data.streaming_shard import JoinedReader, Row
from pipeline.runtime.distributed import first_failure, rank_and_world
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import resolve

_READERS = 256
"""Parts that a process keeps at hand."""
_MAX_WORKERS = 1024
_END = object()


class StreamingSnapshot(StreamingDataset):
    """The samples of a stage, batch by batch in the order of our own loader, as rows of stored columns."""

    def __init__(self, stage: StageConfig) -> None:
        """Open the snapshots and plan; on every rank by itself, with the same settings.

        Args:
            stage: what to read: data, families, global batch. Its batches all have one size.

        Raises:
            UserError: what the stage reads is missing or does not fit, or cannot be given as streaming's rows.
        """
        # Not the constructor of StreamingDataset, which makes the shared memory; see the module's description.
        rank, world = _rank_and_world()
        if stage.data.tokens_per_batch is not None or stage.fusion.encode == "online":
            raise UserError(
                "streaming's batches have one size, and rows no captions: leave data.tokens_per_batch empty and "
                "fusion.encode=families, or use pipeline.data.loader"
            )
        self.data = TrainingData(*resolve(stage), rank, world, torch.device("cpu"))
        self.batch_size = stage.global_batch // world
        self.replication = None
        self._places = [(source, bucket) for source, dataset in enumerate(self.data.parts) for bucket in sorted(dataset)]
        sizes = [self.data.parts[source][bucket] for source, bucket in self._places]
        self._first_parts = np.cumsum([0, *map(len, sizes)])  # of each place, and
        self._first_rows = np.cumsum(np.concatenate([[0], *sizes]))  # of each part
        self.num_samples = int(self._first_rows[-1])
        self._batches = 0, len(self.data.plan(0))  # of the epoch that was asked for last
        self.length = self.batches_in(0) * self.batch_size
        self._readers: OrderedDict[tuple[int, str, int], JoinedReader] = OrderedDict()
        self.upcoming = 0, 0
        """Epoch and batch with which the next turn begins."""
        self.jumps = 0
        """How often `upcoming` was set from outside."""
        self.is_over = False
        """Whether the turn was read to its end; `SnapshotLoader` sees to it."""
        # Number, epoch, batch. A loader process is made with its turn, and looks at the shared one for others if it is kept.
        self._turn = [0, 0, 0]
        self._shared_turn = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._taken = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._is_kept = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        for shared in (self._shared_turn, self._taken):
            shared.share_memory_()

    @property
    def next_epoch(self) -> int:
        """The epoch that the next turn reads."""
        return self.upcoming[0]

    @next_epoch.setter
    def next_epoch(self, next_epoch: int) -> None:
        self._go_to(next_epoch, 0)

    def _go_to(self, epoch: int, batch: int) -> None:
        self._turn[1:] = self.upcoming = epoch, batch
        self.jumps, self.is_over = self.jumps + 1, False

    def begin(self) -> tuple[int, int]:
        """Start a turn: an epoch, or the rest of one. Before each iteration; `SnapshotLoader` does it.

        Returns:
            Epoch and batch with which it begins.

        Raises:
            UserError: this process is another rank than it was when the dataset was opened.
        """
        now, opened = _rank_and_world(), (self.data.rank, self.data.world)
        if now != opened:
            raise UserError(
                f"StreamingSnapshot was opened as rank {opened[0]} of {opened[1]}, and this is rank {now[0]} of {now[1]}: open "
                "it after init_process_group, or set RANK and WORLD_SIZE before"
            )
        self._turn = [self._turn[0] + 1, *self.upcoming]
        self._shared_turn.copy_(torch.tensor(self._turn))
        begun, self.upcoming, self.is_over = self.upcoming, (self.upcoming[0] + 1, 0), False
        return begun

    def __iter__(self) -> Iterator[Row]:
        """This process's samples of the turn.

        Raises:
            StoreError: a file cannot be had in spite of all retries, or is damaged; the message names it.
            UserError: the disk is full, or no turn was begun.
        """
        worker = get_worker_info()
        if worker and not self._is_kept:
            become_loader_process()
        # Now, and not when the first row is taken: by then another turn may have begun.
        number, epoch, first = self._shared_turn.tolist() if self._is_kept else self._turn
        self._is_kept = worker is not None
        return self._rows((number, epoch, first), *((worker.id, worker.num_workers) if worker else (0, 1)))

    def _rows(self, turn: tuple[int, int, int], process: int, processes: int) -> Iterator[Row]:
        number, epoch, first = turn
        if self._taken[process] == number:
            raise UserError("StreamingSnapshot: use SnapshotLoader, or call begin() before each epoch")
        self._taken[process] = number
        for request in self.data.requests(epoch, first + process, processes):
            self.data.dataset.fetch_ahead(request)
            draws = request.draws
            for source, part, row in zip(draws.sources.tolist(), draws.parts.tolist(), draws.rows.tolist(), strict=True):
                yield self._reader(source, draws.bucket, part)[row]

    def _reader(self, source: int, bucket: str, part: int) -> JoinedReader:
        place = source, bucket, part
        if place not in self._readers:
            files, rows = self.data.dataset.sources[source], int(self.data.parts[source][bucket][part])
            self._readers[place] = JoinedReader(files, self.data.dataset.families, bucket, part, rows)
        self._readers.move_to_end(place)
        while len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        return self._readers[place]

    def get_item(self, sample_id: int, retry: int = 0) -> Row:
        """A row by its number: dataset after dataset, bucket after bucket, part after part."""
        part = int(np.searchsorted(self._first_rows, sample_id, side="right")) - 1
        place = int(np.searchsorted(self._first_parts, part, side="right")) - 1
        row = sample_id - int(self._first_rows[part])
        return self._reader(*self._places[place], part - int(self._first_parts[place]))[row]

    def batches_in(self, epoch: int) -> int:
        """Global batches of an epoch."""
        if self._batches[0] != epoch:
            self._batches = epoch, len(self.data.plan(epoch))
        return self._batches[1]

    def position(self, epoch: int, batch: int) -> Position:
        """The position before a global batch; after an epoch's last one, that is the next epoch."""
        return self.data.position(epoch + 1, 0) if batch == self.batches_in(epoch) else self.data.position(epoch, batch)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on, as the position that our loader saves. For who counts samples; `SnapshotLoader` has one of its own.

        Args:
            num_samples: samples that all ranks have taken since the turn began; 0 after its end: none of the next.
            from_beginning: count them from the epoch's beginning instead.

        Raises:
            UserError: `num_samples` is no whole number of global batches, or the epoch has not so many.
        """
        _, epoch, first = self._turn
        size = self.data.stage.global_batch
        if num_samples % size:
            raise UserError(f"{num_samples} samples are not whole batches of {size}: count with SnapshotLoader")
        if self.is_over and not num_samples:
            return self.position(*self.upcoming).to_dict()
        batch = num_samples // size + (0 if from_beginning else first)
        if not 0 <= batch <= self.batches_in(epoch):
            raise UserError(f"batch {batch} of epoch {epoch}, which has {self.batches_in(epoch)}: count anew in each epoch")
        return self.position(epoch, batch).to_dict()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on with the next turn where `state_dict` was taken, on any number of ranks and loader processes.

        Raises:
            UserError: the position is inside an epoch whose order is another now.
        """
        position = Position.from_dict(obj)
        position.check(self.data.position(position.epoch, position.batch))
        self._go_to(position.epoch, position.batch)

    def close(self) -> None:
        """Drop the connections to the store."""
        self.data.close()


class SnapshotLoader(StreamingDataLoader):
    """A DataLoader for `StreamingSnapshot`: each iteration is its next epoch, and an error of one rank is every rank's.

    All ranks iterate alike: they agree on each batch that all have it. To look at rows on one rank, index the dataset.
    """

    _iterator = None

    def __init__(self, dataset: StreamingSnapshot, **options: Any) -> None:
        """Set up; nothing is read yet.

        Args:
            dataset: what to read.
            options: of torch's DataLoader, such as `num_workers` and `collate_fn`; the batch size is the dataset's.

        Raises:
            UserError: an option would give other batches, or in another order.
        """
        for name, value in {"batch_size": dataset.batch_size, "in_order": True}.items():
            if options.setdefault(name, value) != value:
                raise UserError(f"{name}={options[name]}: the stage's batches have {name}={value}: leave it out")
        super().__init__(dataset, **options)
        self._snapshot = dataset
        # Jumps of the dataset when the iteration began, and the epoch and batch that comes next in it.
        self._next: tuple[int, int, int] | None = None

    def _get_batch_size(self, batch: Any) -> int:
        return self._snapshot.batch_size

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or of the rest of one after `load_state_dict`.

        Raises:
            StoreError: on this rank or another, a file cannot be had in spite of all retries, or is damaged; it is named.
            UserError: the disk is full, or this process is another rank than it was when the dataset was opened.
            RuntimeError: another rank has gone, or the epoch ended before its last batch.
        """
        (epoch, place), jumps = self._snapshot.begin(), self._snapshot.jumps
        self._next = jumps, epoch, place
        first_failure("")  # which connects the ranks before the first download: that of one may fail, and end it
        batches = super().__iter__()
        while True:
            batch, failed = _END, None
            try:
                batch = next(batches, _END)
                if batch is _END and place < self._snapshot.batches_in(epoch):  # torch takes a stray StopIteration for the end
                    raise RuntimeError(f"epoch {epoch} has ended early, at batch {place}: does collate_fn raise StopIteration?")
            except Exception as error:
                failed = _without_traceback(error) if isinstance(error, UserError) else error
            told = "" if failed is None else (str(failed) if isinstance(failed, UserError) else "") or repr(failed)
            try:
                of_all = first_failure(told)
            finally:  # also where another rank has gone
                if failed is not None:
                    raise failed
            if of_all:
                del batches  # and with it loader processes
                raise StoreError(of_all)
            if batch is _END:
                self._snapshot.is_over = True
                return
            place += 1
            self._next = jumps, epoch, place
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: with the batch after the one that was given last."""
        at = self._next[1:] if self._next and self._next[0] == self._snapshot.jumps else self._snapshot.upcoming
        return self._snapshot.position(*at).to_dict()


def _rank_and_world() -> tuple[int, int]:
    if dist.is_initialized():
        return rank_and_world()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _without_traceback(error: UserError) -> UserError:
    """The error's own line, before which torch puts the traceback of a loader process.

    The error lets go of its frames: loader processes end at once only if nothing but the iterator that fails holds them.
    """
    error.__traceback__ = None
    text = str(error).rstrip()
    if not text.startswith("Caught "):
        return error
    return type(error)(text.rpartition("\n")[2].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: "))
