"""Training data for one rank: which batches, from where, by which processes.

The order is the plan's (`batches.py`); loader processes only read what they are told to, so their number, the number of ranks
and the moment of a restart change nothing. An exception in a loader process is raised in the trainer.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_prep.dataset.schema import Bucket, Family
from model.common.errors import UserError
from pipeline.data.batch import Batch, PackedBatch
from pipeline.data.dataset import CaptionChoice, Files, PartIndex, Request, SnapshotDataset
from pipeline.data.epoch_plan import PLANNER, EpochPlan, sample_rng
from pipeline.data.mixture import Draws, Mixture, Pieces, source_seeds
from pipeline.data.position import Position
from pipeline.data.shard_cache import ShardCache
from pipeline.stage.config import StageConfig, cache_root
from pipeline.stage.corpus import Corpus, Source
from pipeline.text.texts import PackedText, TextConstants

if TYPE_CHECKING:
    from pipeline.text.online import OnlineTexts

__all__ = ["Batch", "PackedText", "TrainingData", "sample_rng"]

log = logging.getLogger(__name__)

# Loader processes come from a server that has imported the trainer's main module already: that is meant to be so.
warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package.*")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
_PREFETCHED = 2
"""Batches that each loader process keeps ready."""
_MAX_TMPDIR_LENGTH = 75
"""Letters: a socket's path has at most 107, of which Python's server of processes takes 32."""
_FIXED_SEED = 0
"""Of validation: its batches are the same whatever the run's seed is."""


class TrainingData:
    """The stage's snapshots, for one rank."""

    def __init__(self, stage: StageConfig, corpus: Corpus, rank: int, world: int, device: torch.device) -> None:
        """Open the snapshots and plan.

        Args:
            stage: what to read, as `resolve` gives it.
            corpus: the snapshots that `resolve` gives with it.
            rank: this process's number.
            world: number of processes that share each global batch.
            device: where batches go.

        Raises:
            UserError: if the settings do not fit the data.
        """
        self.stage, self.corpus = stage, corpus
        self.rank, self.world, self.device = rank, world, device
        data, families = stage.data, self.corpus.families
        self.latents: Family = families[data.latents]
        self.online: OnlineTexts | None = None
        texts: list[Family] = []
        if stage.fusion.encode == "online":
            from pipeline.text import online  # imports transformers, which loader processes do without

            self.online = online.OnlineTexts(stage, device)
            self.constants = self.online.constants
        else:
            texts = [families[name] for name in dict.fromkeys(stage.fusion.families)]
            self.constants = {family.name: self._constants(family.name) for family in texts}
        if unknown := set(data.caption_weights) - set(self.corpus.caption_kinds):
            kinds = ", ".join(self.corpus.caption_kinds)
            raise UserError(f"data.caption_weights names {', '.join(sorted(unknown))}: the dataset has {kinds}")

        self.dataset = SnapshotDataset(
            [self._files(source) for source in self.corpus.sources], self.latents, texts, self.online is not None
        )
        names = [source.snapshot.dataset for source in self.corpus.sources]
        self.seeds, self.fixed_seeds = source_seeds(data.seed, names), source_seeds(_FIXED_SEED, names)
        self.parts = [
            {bucket: files.index.rows(bucket) for bucket in source.snapshot.buckets}
            for files, source in zip(self.dataset.sources, self.corpus.sources, strict=True)
        ]
        self.held_out = [self._hold_out(number) for number in range(len(self.parts))]
        self.batch_sizes = self._batch_sizes()
        self.mixture = Mixture(self.parts, [source.weight for source in self.corpus.sources])
        self._closing: Event | None = None
        self._loader: Iterator[PackedBatch | Exception] | None = None
        # Runs before multiprocessing's own end, which waits for processes that do not end by themselves.
        atexit.register(self.close)

    def _constants(self, name: str) -> TextConstants:
        """A text family's constants for all datasets."""
        first, *others = (
            TextConstants.load(source.dataset, source.snapshot.families[name], self.device) for source in self.corpus.sources
        )
        return first.for_all(others)

    def _files(self, source: Source) -> Files:
        data = self.stage.data
        limit = None if data.cache_limit_gb is None else int(data.cache_limit_gb * 1e9)
        cache = ShardCache(source.dataset, cache_root(data), source.snapshot.id, limit)
        cache.clean()
        captions = CaptionChoice(source.snapshot.caption_kinds, data.caption_weights, data.caption_drop)
        return Files(cache, PartIndex(cache, source.snapshot), captions)

    def _hold_out(self, number: int) -> Draws:
        """Take a dataset's validation rows out of training: the last parts of its largest bucket."""
        count, dataset = self.stage.data.validation_parts, self.parts[number]
        largest = max(sorted(dataset), key=lambda bucket: int(dataset[bucket].sum()))
        sizes = dataset[largest]
        if count >= len(sizes):
            name = self.corpus.sources[number].snapshot.dataset
            raise UserError(f"data.validation_parts={count}: bucket {largest} of {name} has {len(sizes)} parts: hold out fewer")
        kept = len(sizes) - count
        dataset[largest] = sizes[:kept]
        parts = np.repeat(np.arange(kept, len(sizes)), sizes[kept:])
        rows = np.concatenate([np.arange(size) for size in sizes[kept:]] or [np.zeros(0, np.int64)])
        return Draws(largest, np.full(len(rows), number), np.zeros(len(rows), np.int64), parts, rows)

    def _batch_sizes(self) -> dict[str, int]:
        """Bucket -> samples of a global batch; buckets that do not fill one are left out of training."""
        stage, sizes = self.stage, {}
        down, micro_batch = int(self.latents.info["downsampling"]), stage.engine.micro_batch
        micro_steps = max(1, stage.global_batch // self.world // micro_batch) if micro_batch else 1
        for name in sorted({name for dataset in self.parts for name in dataset}):
            bucket, rows = Bucket.parse(name), sum(int(dataset[name].sum()) for dataset in self.parts if name in dataset)
            sizes[name] = wanted = stage.batch(bucket.height // down * (bucket.width // down))
            if not wanted:
                raise UserError(f"data.tokens_per_batch={stage.data.tokens_per_batch}: no batch of bucket {name} fits: raise it")
            if wanted % (self.world * micro_steps):
                raise UserError(
                    f"{wanted} samples a batch of bucket {name} are not a multiple of {self.world} processes of {micro_steps} "
                    "micro-batches: change global_batch, or data.batch_multiple with data.tokens_per_batch"
                )
            if rows < wanted:
                del sizes[name]
                for dataset in self.parts:
                    dataset.pop(name, None)
                if self.rank == 0:
                    log.warning("bucket %s is left out: its %d samples are fewer than a global batch of %d", name, rows, wanted)
        for source, dataset in zip(self.corpus.sources, self.parts, strict=True):
            if not any(part_sizes.any() for part_sizes in dataset.values()):
                name = source.snapshot.dataset
                raise UserError(f"global_batch={stage.global_batch}: no bucket of {name} has as many samples: lower global_batch")
        return sizes

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        return self._plan(self.mixture.epoch(epoch), epoch)

    def _plan(self, pieces: dict[str, Pieces], epoch: int) -> EpochPlan:
        data = self.stage.data
        rows = {bucket: piece.rows for bucket, piece in pieces.items()}
        mixed = len(self.parts) > 1
        origins = {bucket: (piece.sources, piece.passes) for bucket, piece in pieces.items()} if mixed else None
        return EpochPlan(data.seed, epoch, rows, self.batch_sizes, data.canonical_nodes, data.shuffle_parts, origins)

    def start(self) -> Position:
        """The position before the first batch."""
        return self.position(0, 0)

    def position(self, epoch: int, batch: int) -> Position:
        """The position before global batch `batch` of an epoch."""
        data = self.stage.data
        order = {
            "planner": PLANNER,
            "canonical_nodes": data.canonical_nodes,
            "shuffle_parts": data.shuffle_parts,
            "validation_parts": data.validation_parts,
        }
        if data.tokens_per_batch is not None:
            order |= {"tokens_per_batch": data.tokens_per_batch, "batch_multiple": data.batch_multiple}
        return Position(self.corpus.id, data.seed, epoch, batch, self.stage.global_batch, order)

    def batches(self, position: Position | None = None) -> Iterator[tuple[Batch, Position]]:
        """This rank's batches from `position` on, epoch after epoch without an end, each with the position after it.

        Raises:
            UserError: the position is inside an epoch of another order, or a file cannot be read or fetched.
        """
        for item in self.packed(position):
            after = self.position(item.epoch + 1, 0) if item.last else self.position(item.epoch, item.index + 1)
            yield self._unpack(item), after

    def _unpack(self, item: PackedBatch) -> Batch:
        """The batch on the device, with its captions encoded if that is done here."""
        batch = item.unpack(self.device)
        if self.online is not None and batch.captions is not None:
            batch.texts = self.online.encode(batch.captions)
        return batch

    def packed(self, position: Position | None = None) -> Iterator[PackedBatch]:
        """As `batches`, before the copy to the device."""
        at = position or self.start()
        at.check(self.position(at.epoch, at.batch))
        self._shut_down()
        self._loader = self._start(self._requests(at.epoch, at.batch))
        try:
            while self._loader is not None:
                try:
                    item = next(self._loader)
                except (EOFError, OSError) as error:
                    raise RuntimeError(f"a loader process failed or was killed: {error!r}") from error
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            # At once, and not when the exception, which holds this frame, is forgotten.
            self._shut_down()

    def _requests(self, epoch: int, batch: int) -> Iterator[Request]:
        """What to read, without an end; taken a few batches ahead of the trainer."""
        while True:
            yield from self.requests(epoch, batch)
            epoch, batch = epoch + 1, 0

    def requests(self, epoch: int, first: int = 0, step: int = 1) -> Iterator[Request]:
        """This rank's share of an epoch's global batches from `first` on, or of each `step`th."""
        pieces = self.mixture.epoch(epoch)
        plan = self._plan(pieces, epoch)
        if self.rank == 0:
            left = {bucket: rows for bucket, rows in plan.left_over().items() if rows}
            log.info("epoch %d: %d batches; left over: %s", epoch, len(plan), left or "none")
        for index in range(first, len(plan), step):
            bucket, ahead = plan.ahead(index, self.rank, self.world)
            soon = tuple((int(pieces[bucket].sources[at]), int(pieces[bucket].parts[at])) for at in ahead)
            draws = pieces[bucket].draws(plan.batch(index, self.rank, self.world))
            yield Request(draws, epoch, index, self.seeds, index == len(plan) - 1, soon)

    def _start(self, requests: Iterator[Request]) -> Iterator[PackedBatch | Exception]:
        workers = self.stage.data.workers
        if not workers:
            return iter(self._torch_loader(requests))
        if len(os.fsencode(tempfile.gettempdir())) > _MAX_TMPDIR_LENGTH:
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()}: over {_MAX_TMPDIR_LENGTH} letters, too many for the sockets of loader "
                "processes: set a shorter one, or data.workers=0"
            )
        # What starts with blocked signals keeps them blocked, Python's server of processes and its tracker of resources too: a
        # signal to the whole job step (Slurm's notice before the time limit) must reach the trainer alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the line above may have unblocked some
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_imported_once())
            self._closing = context.Event()
            return iter(
                self._torch_loader(
                    requests,
                    num_workers=workers,
                    multiprocessing_context=context,
                    worker_init_fn=_WorkerStart(self._closing),
                    prefetch_factor=_PREFETCHED,
                )
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _torch_loader(self, requests: Iterator[Request], **processes: Any) -> DataLoader[PackedBatch | Exception]:
        return DataLoader(
            self.dataset,
            batch_size=None,  # an item is a batch already
            sampler=requests,
            pin_memory=self.device.type == "cuda",
            **processes,
        )

    def validation(self) -> Iterator[Batch]:
        """This rank's batches of the held-out parts: the same samples, captions and noise every time; none if none are held out.

        All ranks get equally many samples; up to one batch of rows at the end is left out.

        Raises:
            UserError: fewer samples are held out than there are ranks.
        """
        for held_out in self.held_out:
            rows = len(held_out.rows)
            if not rows:
                return
            size = min(self.stage.global_batch, rows - rows % self.world)
            if not size:
                raise UserError(f"data.validation_parts holds out {rows} samples for {self.world} processes: hold out more parts")
            share = size // self.world
            for index in range(rows // size):
                low = index * size + self.rank * share
                item = self.dataset[Request(held_out.at(low, low + share), 0, index, self.fixed_seeds, drop=False)]
                if isinstance(item, Exception):
                    raise item
                yield self._unpack(item)

    def _shut_down(self) -> None:
        if self._closing is not None:
            self._closing.set()
        self._loader = None  # which waits for its processes
        self._closing = None

    def close(self) -> None:
        """End the loader processes."""
        self._shut_down()
        for source in self.corpus.sources:
            source.dataset.close()
        atexit.unregister(self.close)


def _imported_once() -> list[str]:
    """Modules that the server of loader processes imports for all of them: this one, and what the main module needs.

    Loader processes come from that clean server, so they inherit no connection, lock, thread or CUDA context.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return [__name__, *([main.name] if main else [])]


def become_loader_process() -> None:
    """Ignore signals that are meant for the trainer, and end as soon as it does, however that ends.

    torch watches the parent instead, which may be a server of processes that in its turn waits for this process: both would
    outlive a kill.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()
    for number in _SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class _WorkerStart:
    """How a loader process begins."""

    def __init__(self, closing: Event) -> None:
        self.closing = closing
        self.environment = dict(os.environ)

    def __call__(self, worker: int) -> None:
        """Ignore signals that are meant for the trainer; end on SIGTERM only when the trainer is closing or gone."""
        # The server of processes may have been started under an older environment than the trainer's (credentials, endpoint).
        os.environ.update(self.environment)
        parent = os.getppid()

        def end(number: int, frame: object) -> None:
            if self.closing.is_set() or os.getppid() != parent:
                os._exit(128 + number)

        become_loader_process()
        signal.signal(signal.SIGTERM, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        torch.set_num_threads(1)
