"""A stage's snapshots for trainers that are built on mosaicml-streaming.

    dataset = StreamingSnapshot(load_stage("li_dit_1b_256", ["data.store=s3://bucket/prefix"]))
    for batch in SnapshotLoader(dataset, num_workers=8, collate_fn=...):

A row joins the columns of all families of the stage, as they are stored, under `family/column`, with the
sample's `id`. Order, batches, files and positions are those of our own loader (`loader.py`): each step has
one bucket on all ranks, on any number of ranks, every file is checked before it is read, and an epoch
continues where it stopped.

To its users this is a StreamingDataset with a StreamingDataLoader. It does not use streaming 0.13's work
sharing: shared memory that survives a killed job and breaks the next one, barriers that wait for processes
that have failed, 8 bytes of plan per sample. Each process works out its rows from the plan by itself, and the
ranks only agree, batch by batch, that none has failed.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from torch.utils.data import get_worker_info

from data_prep.dataset.mds import Shard
from data_prep.store.store import StoreError
from model.common.errors import UserError
from pipeline.data.loader import TrainingData
from pipeline.data.loader_processes import become_loader_process
from pipeline.data.part_files import disagree
from pipeline.data.position import Position
from pipeline.runtime.distributed import first_failure, rank_and_world
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import resolve

Row = dict[str, Any]

_MAX_WORKERS = 1024
_END = object()


class StreamingSnapshot(StreamingDataset):
    """The samples of a stage, batch by batch in the order of our own loader, as rows of stored columns."""

    def __init__(self, stage: StageConfig) -> None:
        """Open the snapshots and plan; each rank does so by itself, with the same settings.

        Args:
            stage: names the data, the families and the global batch. All batches have one size.

        Raises:
            UserError: if the data of the stage is missing, does not fit, or cannot be expressed as
                streaming's rows.
        """
        # Not the constructor of StreamingDataset, which makes the shared memory; see the module's
        # description.
        rank, world = rank_and_world(from_environment=True)
        if stage.data.tokens_per_batch is not None or stage.fusion.encode == "online":
            raise UserError(
                "streaming's batches have one size, and rows no captions: leave data.tokens_per_batch empty "
                "and fusion.encode=families, or use pipeline.data.loader"
            )
        self.data = TrainingData(*resolve(stage), rank, world, torch.device("cpu"))
        self.batch_size = stage.global_batch // world
        self.replication = None

        parts = self.data.schedule.parts
        # A row number counts through datasets, buckets and parts in this order, which must be the same in
        # every process.
        self._places = [
            (source, bucket) for source, dataset in enumerate(parts) for bucket in sorted(dataset)
        ]
        sizes = [parts[source][bucket] for source, bucket in self._places]
        # First part of each place, and first row of each part, in the numbering of `get_item`.
        self._first_parts = np.cumsum([0, *map(len, sizes)])
        self._first_rows = np.cumsum(np.concatenate([[0], *sizes]))
        self.num_samples = int(self._first_rows[-1])
        self._batches = 0, len(self.data.schedule.plan(0))  # of the epoch that was asked for last
        self.length = self.batches_in(0) * self.batch_size

        # What trainers that are built on streaming read or log, by its names for it.
        data = stage.data
        self.shuffle, self.shuffle_seed, self.num_canonical_nodes = True, data.seed, data.canonical_nodes
        self.epoch_size = self.length
        self.cache_limit = None if data.cache_limit_gb is None else int(data.cache_limit_gb * 2**30)

        self.upcoming = 0, 0
        """Epoch and batch with which the next iteration begins."""
        self.jumps = 0
        """Number of times that `upcoming` was set from outside."""
        self.is_over = False
        """True if the iteration was read to its end; `SnapshotLoader` sets it."""

        # Number, epoch, batch. A loader process is created with its iteration; if it is kept for others, it
        # finds them in the shared copy.
        self._iteration = [0, 0, 0]
        self._shared_iteration = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._read_iterations = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._is_kept = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        for shared in (self._shared_iteration, self._read_iterations):
            shared.share_memory_()

    def __getattr__(self, name: str) -> NoReturn:
        """Say why an attribute of StreamingDataset is not there; `hasattr` and a default work as always."""
        raise AttributeError(
            f"StreamingSnapshot has no `{name}`: its order, files and cache are those of the stage's own "
            "loader (`data`), not streams and shards of streaming",
            name=name,
            obj=self,
        )

    @property
    def next_epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return self.upcoming[0]

    @next_epoch.setter
    def next_epoch(self, next_epoch: int) -> None:
        self._go_to(next_epoch, 0)

    def _go_to(self, epoch: int, batch: int) -> None:
        self._iteration[1:] = self.upcoming = epoch, batch
        # The loader's own count of batches is void after a jump; `SnapshotLoader.state_dict` compares the
        # numbers.
        self.jumps, self.is_over = self.jumps + 1, False

    def begin(self) -> tuple[int, int]:
        """Start an iteration: an epoch, or the rest of one.

        Call it before each iteration, as `SnapshotLoader` does.

        Returns:
            Epoch and batch with which it begins.

        Raises:
            UserError: if this process's rank is not the one that it had when the dataset was opened.
        """
        now = rank_and_world(from_environment=True)
        opened = self.data.schedule.rank, self.data.schedule.world
        if now != opened:
            raise UserError(
                f"StreamingSnapshot was opened as rank {opened[0]} of {opened[1]}, and this is rank {now[0]} "
                f"of {now[1]}: open it after init_process_group, or set RANK and WORLD_SIZE before"
            )
        self._iteration = [self._iteration[0] + 1, *self.upcoming]
        self._shared_iteration.copy_(torch.tensor(self._iteration))
        begun, self.upcoming, self.is_over = self.upcoming, (self.upcoming[0] + 1, 0), False
        return begun

    def __iter__(self) -> Iterator[Row]:
        """Iterate over this process's samples of the iteration.

        Raises:
            StoreError: if a file cannot be fetched in spite of all retries, or is damaged; the message names
                it.
            UserError: if the disk is full, or `begin` was not called.
        """
        worker = get_worker_info()
        if worker and not self._is_kept:
            become_loader_process()
        # Now, and not when the first row is read: by then another iteration may have begun.
        number, epoch, first = self._shared_iteration.tolist() if self._is_kept else self._iteration
        self._is_kept = worker is not None
        return self._rows((number, epoch, first), *((worker.id, worker.num_workers) if worker else (0, 1)))

    def _rows(self, iteration: tuple[int, int, int], process: int, processes: int) -> Iterator[Row]:
        number, epoch, first = iteration
        # The same iteration read twice would silently train on the same samples again.
        if self._read_iterations[process] == number:
            raise UserError("StreamingSnapshot: use SnapshotLoader, or call begin() before each epoch")
        self._read_iterations[process] = number

        opened = self.data.dataset.shards
        # Batch i goes to loader process i modulo their number: torch's DataLoader takes batches from them in
        # this order.
        for request in self.data.schedule.requests(epoch, first + process, processes):
            batch = request.rows
            opened.fetch_ahead(batch.bucket, request.ahead)
            shards = opened.open(batch.bucket, set(batch.places))
            for place, index in zip(batch.places, batch.indices.tolist(), strict=True):
                yield self.read_row(shards[place], index)

    def get_item(self, sample_id: int, retry: int = 0) -> Row:
        """Return a row by its number: dataset after dataset, bucket after bucket, part after part."""
        part = int(np.searchsorted(self._first_rows, sample_id, side="right")) - 1
        number = int(np.searchsorted(self._first_parts, part, side="right")) - 1
        source, bucket = self._places[number]
        place = source, part - int(self._first_parts[number])
        shards = self.data.dataset.shards.open(bucket, {place})[place]
        return self.read_row(shards, sample_id - int(self._first_rows[part]))

    def read_row(self, shards: Mapping[str, Shard], index: int) -> Row:
        """Return one row of a part with the columns of all families.

        Args:
            shards: family -> the part's shard.
            index: the row's number in the part.

        Raises:
            StoreError: if the row is damaged, or the families contain other samples.
        """
        joined: Row = {}
        first = next(iter(shards.values()))
        for family, shard in shards.items():
            row = shard[index]
            id = row.pop("id")
            if id != joined.setdefault("id", id):
                raise disagree(first, shard, "sample ids")
            joined |= {f"{family}/{name}": value for name, value in row.items()}
        return joined

    def batches_in(self, epoch: int) -> int:
        """Return the number of global batches of an epoch."""
        if self._batches[0] != epoch:
            self._batches = epoch, len(self.data.schedule.plan(epoch))
        return self._batches[1]

    def position(self, epoch: int, batch: int) -> Position:
        """Return the position before a global batch; after an epoch's last one, that is the next epoch."""
        next_batch = (epoch + 1, 0) if batch == self.batches_in(epoch) else (epoch, batch)
        return self.data.schedule.position(*next_batch)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return where to continue, as the position that our loader saves.

        This is for callers that count samples; `SnapshotLoader` has a method of its own.

        Args:
            num_samples: samples that all ranks have taken since the iteration began; 0 after its end: none of
                the next.
            from_beginning: count them from the epoch's beginning instead.

        Raises:
            UserError: if `num_samples` is not a whole number of global batches, or the epoch is shorter.
        """
        _, epoch, first = self._iteration
        # Positions are in global batches, which are the same on any number of ranks.
        size = self.data.stage.global_batch
        if num_samples % size:
            raise UserError(
                f"{num_samples} samples are not whole batches of {size}: count with SnapshotLoader"
            )
        if self.is_over and not num_samples:
            return self.position(*self.upcoming).to_dict()

        batch = num_samples // size + (0 if from_beginning else first)
        if not 0 <= batch <= self.batches_in(epoch):
            count = self.batches_in(epoch)
            raise UserError(f"batch {batch} of epoch {epoch}, which has {count}: count from 0 in each epoch")
        return self.position(epoch, batch).to_dict()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Let the next iteration continue where `state_dict` was called.

        The number of ranks and loader processes may have changed.

        Raises:
            UserError: if the position is inside an epoch whose order has changed.
        """
        position = Position.from_dict(obj)
        position.check(self.data.schedule.position(position.epoch, position.batch))
        self._go_to(position.epoch, position.batch)

    def close(self) -> None:
        """Drop the connections to the store."""
        self.data.close()


class SnapshotLoader(StreamingDataLoader):
    """A DataLoader for `StreamingSnapshot`: each iteration is its next epoch.

    An error on one rank is raised on every rank. All ranks iterate together: they agree on each batch
    that all of them have it. To look at rows on one rank, index the dataset.
    """

    _iterator = None

    def __init__(self, dataset: StreamingSnapshot, **options: Any) -> None:
        """Set up; nothing is read yet.

        Args:
            dataset: reads the rows.
            options: of torch's DataLoader, such as `num_workers` and `collate_fn`; the batch size is the
                dataset's.

        Raises:
            UserError: if an option would change the batches or their order.
        """
        for name, value in {"batch_size": dataset.batch_size, "in_order": True}.items():
            # Another value would cut or reorder the batches, and positions would no longer mean the rows that
            # were read.
            if options.setdefault(name, value) != value:
                raise UserError(
                    f"{name}={options[name]}: the stage's batches have {name}={value}: leave it out"
                )
        super().__init__(dataset, **options)
        self._snapshot = dataset
        # Jumps of the dataset when the iteration began, and the epoch and batch that comes next in it.
        self._next: tuple[int, int, int] | None = None

    def _get_batch_size(self, batch: Any) -> int:
        return self._snapshot.batch_size

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches of the next epoch, or of the rest of one after `load_state_dict`.

        Raises:
            StoreError: if on any rank a file cannot be fetched in spite of all retries, or is damaged; the
                message names it.
            UserError: if the disk is full, or this process's rank is not the one that it had when the dataset
                was opened.
            RuntimeError: if another rank has exited, or the epoch ended before its last batch.
        """
        (epoch, number), jumps = self._snapshot.begin(), self._snapshot.jumps
        self._next = jumps, epoch, number
        first_failure("")  # connects the ranks before the first download, which may fail and end a rank
        batches = super().__iter__()
        while True:
            batch, error = self._next_batch(batches, epoch, number)
            try:
                failure = first_failure("" if error is None else _message(error))
            finally:  # this rank's own error comes first, even if another rank has exited
                if error is not None:
                    raise error
            if failure:
                del batches  # and with it the loader processes
                raise StoreError(failure)
            if batch is _END:
                self._snapshot.is_over = True
                return
            number += 1
            self._next = jumps, epoch, number
            yield batch

    def _next_batch(self, batches: Iterator[Any], epoch: int, number: int) -> tuple[Any, Exception | None]:
        """Return the next batch, or `_END`; or else the error."""
        try:
            batch = next(batches, _END)
            # torch takes a stray StopIteration for the end.
            if batch is _END and number < self._snapshot.batches_in(epoch):
                raise RuntimeError(
                    f"epoch {epoch} has ended early, at batch {number}: does collate_fn raise StopIteration?"
                )
        except UserError as error:
            return _END, _without_traceback(error)
        except Exception as error:
            return _END, error
        return batch, None

    def state_dict(self) -> dict[str, Any]:
        """Return where to continue: with the batch after the last one that was yielded."""
        epoch, batch = self._snapshot.upcoming
        if self._next is not None and self._next[0] == self._snapshot.jumps:
            _, epoch, batch = self._next
        return self._snapshot.position(epoch, batch).to_dict()


def _message(error: Exception) -> str:
    """Return a text for the other ranks, never empty."""
    return (str(error) if isinstance(error, UserError) else "") or repr(error)


def _without_traceback(error: UserError) -> UserError:
    """Return the error's own line, without the traceback of a loader process that torch puts before it.

    The error must not keep its frames: loader processes end at once only if nothing else refers to the
    iterator that failed.
    """
    error.__traceback__ = None
    # As it was given: `str` has it on one line.
    text = str(error.args[0]).rstrip() if error.args else ""
    if not text.startswith("Caught "):
        return error
    return type(error)(
        text.rpartition("\n")[2].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    )
