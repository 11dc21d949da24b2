"""The batches of one rank: a stage and its corpus become requests for rows, from any position on."""

import logging
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from model.common.errors import UserError
from pipeline.data.dataset import BatchRequest, latent_shape
from pipeline.data.epoch_plan import PLANNER, EpochPlan
from pipeline.data.mixture import EpochRows, Mixture, Pieces, source_seeds
from pipeline.data.part_files import PartIndex
from pipeline.data.position import Position
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus

log = logging.getLogger(__name__)

_FIXED_SEED = 0
"""Validation uses this seed, so its batches do not depend on the run's."""


class Schedule:
    """The order of the stage's samples, and this rank's share of each global batch.

    It works with integers from the parts' indexes, and reads no payload.
    """

    def __init__(
        self, stage: StageConfig, corpus: Corpus, indexes: Sequence[PartIndex], rank: int, world: int
    ) -> None:
        """Plan.

        Args:
            stage: data and batch size, as `resolve` returns it.
            corpus: the snapshots that `resolve` returns with it.
            indexes: the parts of each dataset of the corpus.
            rank: this process's number.
            world: number of processes that share each global batch.

        Raises:
            UserError: if the settings do not fit the data.
        """
        self.stage, self.rank, self.world = stage, rank, world
        self._corpus = corpus
        self._names = [source.snapshot.dataset for source in corpus.sources]
        self._seeds = source_seeds(stage.data.seed, self._names)
        self.parts: list[dict[str, np.ndarray]] = []
        """Per dataset, bucket -> rows of each part that is trained on."""

        for index in indexes:
            self.parts.append({bucket: index.rows(bucket) for bucket in index.paths})

        # Held-out parts first: they must not count when a bucket is tested for filling a batch.
        self._held_out = [self._hold_out(number) for number in range(len(self.parts))]
        self.batch_sizes = self._batch_sizes()
        """Bucket -> samples of a global batch."""
        self._mixture = Mixture(self.parts, [source.weight for source in corpus.sources])

    def _hold_out(self, number: int) -> EpochRows:
        """Take a dataset's validation rows out of training: the last parts of its largest bucket."""
        count, dataset = self.stage.data.validation_parts, self.parts[number]
        # Sorted, so that of two equally large buckets every rank takes the same.
        largest = max(sorted(dataset), key=lambda bucket: int(dataset[bucket].sum()))
        sizes = dataset[largest]
        if count >= len(sizes):
            raise UserError(
                f"data.validation_parts={count}: bucket {largest} of {self._names[number]} has {len(sizes)} "
                "parts: hold out fewer"
            )

        trained = len(sizes) - count
        # The last parts are cut off and the others keep their numbers, by which the index finds their files.
        dataset[largest] = sizes[:trained]
        parts = np.repeat(np.arange(trained, len(sizes)), sizes[trained:])
        indices = np.concatenate([np.arange(size) for size in sizes[trained:]] or [np.zeros(0, np.int64)])
        return EpochRows(
            largest, np.full(len(indices), number), np.zeros(len(indices), np.int64), parts, indices
        )

    def _batch_sizes(self) -> dict[str, int]:
        """Bucket -> samples of a global batch; buckets that do not fill one are taken out of training."""
        sizes = {}
        for bucket in sorted({bucket for dataset in self.parts for bucket in dataset}):
            size = self._batch_size(bucket)
            rows = sum(int(dataset[bucket].sum()) for dataset in self.parts if bucket in dataset)
            # The mixture as a whole has to fill a batch; a single dataset of it need not.
            if rows >= size:
                sizes[bucket] = size
                continue
            for dataset in self.parts:
                dataset.pop(bucket, None)
            if self.rank == 0:
                message = "bucket %s is left out: its %d samples are fewer than a global batch of %d"
                log.warning(message, bucket, rows, size)

        for name, dataset in zip(self._names, self.parts, strict=True):
            # A mixture of which one dataset has nothing left would silently train with other weights.
            if not any(part_sizes.any() for part_sizes in dataset.values()):
                raise UserError(
                    f"global_batch={self.stage.global_batch}: no bucket of {name} has as many samples: "
                    "lower global_batch"
                )
        return sizes

    def _batch_size(self, bucket: str) -> int:
        stage = self.stage
        latents = self._corpus.families[stage.data.latents]
        size = stage.batch(prod(latent_shape(latents, bucket)[1:]))
        if not size:
            budget = f"data.tokens_per_batch={stage.data.tokens_per_batch}"
            raise UserError(f"{budget}: no batch of bucket {bucket} fits: raise it")

        micro_batch = stage.engine.micro_batch
        # DeepSpeed fixes the number of micro-steps when the engine is made, so smaller buckets make smaller
        # micro-batches and not fewer.
        micro_steps = max(1, stage.global_batch // self.world // micro_batch) if micro_batch else 1
        if size % (self.world * micro_steps):
            raise UserError(
                f"{size} samples per batch of bucket {bucket} are not a multiple of {self.world} processes "
                f"of {micro_steps} micro-batches: change global_batch, or data.batch_multiple with "
                "data.tokens_per_batch"
            )
        return size

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of one epoch."""
        return self._plan(self._mixture.epoch(epoch), epoch)

    def _plan(self, pieces: dict[str, Pieces], epoch: int) -> EpochPlan:
        data = self.stage.data
        rows = {bucket: piece.rows for bucket, piece in pieces.items()}
        # One dataset keeps its purely random order of parts; only a mixture has to be interleaved.
        origins = None
        if len(self.parts) > 1:
            origins = {bucket: (piece.sources, piece.passes) for bucket, piece in pieces.items()}
        return EpochPlan(
            data.seed, epoch, rows, self.batch_sizes, data.canonical_nodes, data.shuffle_parts, origins
        )

    def position(self, epoch: int, batch: int) -> Position:
        """Return the position before global batch `batch` of an epoch."""
        data = self.stage.data
        order = {
            "planner": PLANNER,
            "canonical_nodes": data.canonical_nodes,
            "shuffle_parts": data.shuffle_parts,
            "validation_parts": data.validation_parts,
        }
        # `batch_multiple` decides nothing without `tokens_per_batch`, and may then change within an epoch.
        if data.tokens_per_batch is not None:
            order |= {"tokens_per_batch": data.tokens_per_batch, "batch_multiple": data.batch_multiple}
        return Position(self._corpus.id, data.seed, epoch, batch, self.stage.global_batch, order)

    def requests(self, epoch: int, first: int = 0, step: int = 1) -> Iterator[BatchRequest]:
        """Yield this rank's share of an epoch's global batches from `first` on, or of each `step`th."""
        pieces = self._mixture.epoch(epoch)
        plan = self._plan(pieces, epoch)
        if self.rank == 0:
            left_over = {bucket: rows for bucket, rows in plan.left_over().items() if rows}
            log.info("epoch %d: %d batches; left over: %s", epoch, len(plan), left_over or "none")

        for index in range(first, len(plan), step):
            rows = plan.batch(index, self.rank, self.world)
            bucket, ahead = plan.ahead(index, self.rank, self.world)
            sources, parts = pieces[bucket].sources, pieces[bucket].parts
            soon = tuple((int(sources[piece]), int(parts[piece])) for piece in ahead)
            yield BatchRequest(
                pieces[bucket].pick(rows), epoch, index, self._seeds, index == len(plan) - 1, soon
            )

    def validation_requests(self) -> Iterator[BatchRequest]:
        """Yield this rank's share of the held-out parts: the same samples, captions and noise every time.

        All ranks get equally many samples; up to one batch of rows at the end is left out.

        Raises:
            UserError: if fewer samples are held out than there are ranks.
        """
        seeds = source_seeds(_FIXED_SEED, self._names)
        for held_out in self._held_out:
            rows = len(held_out.indices)
            if not rows:
                return
            # Equal shares, since each forward pass under ZeRO-3 needs all ranks.
            size = min(self.stage.global_batch, rows - rows % self.world)
            if not size:
                raise UserError(
                    f"data.validation_parts holds out {rows} samples for {self.world} processes: "
                    "hold out more parts"
                )

            share = size // self.world
            for index in range(rows // size):
                low = index * size + self.rank * share
                # No caption is dropped: the loss would otherwise mix two tasks.
                yield BatchRequest(held_out.slice(low, low + share), 0, index, seeds, drop_captions=False)
