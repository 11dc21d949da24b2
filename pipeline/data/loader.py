"""Training data for one rank: this rank's batches on its device.

The schedule decides the order (`schedule.py`); loader processes only read what they are asked for, so their
number, the number of ranks and the moment of a restart change nothing. An exception in a loader process is
raised in the trainer.
"""

import atexit
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from pipeline.data.batch import Batch, PackedBatch
from pipeline.data.captions import CaptionChoice
from pipeline.data.dataset import BatchRequest, SnapshotDataset
from pipeline.data.loader_processes import LoaderProcesses
from pipeline.data.part_files import DatasetFiles
from pipeline.data.position import Position
from pipeline.data.schedule import Schedule
from pipeline.stage.adapters import check_users
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, is_clip
from pipeline.stage.forgotten import forgotten_users
from pipeline.text.families import load_constants

if TYPE_CHECKING:
    from pipeline.text.online import OnlineTexts


class TrainingData:
    """The stage's snapshots, for one rank."""

    def __init__(
        self, stage: StageConfig, corpus: Corpus, rank: int, world: int, device: torch.device
    ) -> None:
        """Open the snapshots and plan.

        Args:
            stage: names the families and the batch size; as `resolve` returns it.
            corpus: the snapshots that `resolve` returns with it.
            rank: this process's number.
            world: number of processes that share each global batch.
            device: where batches go.

        Raises:
            UserError: if the settings do not fit the data, or an encoder cannot be loaded.
        """
        self.stage, self.corpus, self.device = stage, corpus, device
        data = stage.data
        if unknown := set(data.caption_weights) - set(corpus.caption_kinds):
            kinds = ", ".join(corpus.caption_kinds)
            raise UserError(
                f"data.caption_weights names {', '.join(sorted(unknown))}: the dataset has {kinds}"
            )

        self.constants = load_constants(stage, corpus, device)
        self._online: OnlineTexts | None = None
        texts: dict[bool, list[Family]] = {False: [], True: []}
        if stage.fusion.encode == "online":
            # It imports transformers, which processes that only read batches do without.
            from pipeline.text import online

            self._online = online.OnlineTexts(stage, self.constants, device)
        else:
            for clips, families in texts.items():
                # Two refiners may read the same family, which is read from the store only once.
                names = dict.fromkeys(stage.fusion.families_of(clips))
                families += [corpus.families[name] for name in names]

        files = [DatasetFiles.open(source, data) for source in corpus.sources]
        choices = [
            CaptionChoice(source.snapshot.caption_kinds, data.caption_weights, data.caption_drop)
            for source in corpus.sources
        ]
        latents = corpus.families[data.latents]
        self.dataset = SnapshotDataset(
            files,
            choices,
            latents,
            texts,
            reads_captions=self._online is not None,
            user_drop=stage.users.drop if stage.users.count else None,
            forgotten=forgotten_users(stage.run, stage.start_from) if stage.users.count else (),
        )
        if stage.users.count:
            check_users(stage.users, files[0].index.highest_user, corpus.sources[0].snapshot.id)
        self.schedule = Schedule(stage, corpus, [dataset.index for dataset in files], rank, world)

        self._processes: LoaderProcesses | None = None
        # Runs before multiprocessing's own exit handler, which waits for processes that do not end by
        # themselves.
        atexit.register(self.close)

    def batches(self, position: Position | None = None) -> Iterator[tuple[Batch, Position]]:
        """Yield this rank's batches from `position` on without an end, each with the position after it.

        Raises:
            UserError: if the position is inside an epoch of another order, or a file cannot be fetched or is
                damaged.
        """
        for item in self.packed(position):
            # The position is saved after the step on this batch, so it names the batch that follows.
            next_batch = (item.epoch + 1, 0) if item.last else (item.epoch, item.index + 1)
            yield self._unpack(item), self.schedule.position(*next_batch)

    def _unpack(self, item: PackedBatch) -> Batch:
        """Put a batch on the device, and encode its captions if that is done here."""
        batch = item.unpack(self.device)
        if self._online is not None and batch.captions is not None:
            batch.texts = self._online.encode(batch.captions, is_clip(batch.bucket))
        return batch

    def packed(self, position: Position | None = None) -> Iterator[PackedBatch]:
        """Yield the same as `batches`, before the copy to the device."""
        start = position or self.schedule.position(0, 0)
        # Compared with the same place under today's settings: a changed order would repeat some samples and
        # skip others.
        start.check(self.schedule.position(start.epoch, start.batch))
        # A second call starts over: the processes of the first would otherwise read on, for nobody.
        self._end_processes()
        # Without an end, so that the processes already read the next epoch while the last batches of this one
        # train.
        requests = self._endless_requests(start.epoch, start.batch)
        pin_memory = self.device.type == "cuda"
        self._processes = LoaderProcesses(self.dataset, requests, self.stage.data.workers, pin_memory)
        try:
            while self._processes is not None:
                yield next(self._processes)
        finally:
            # At once, and not when the exception, which holds this frame, is forgotten.
            self._end_processes()

    def _endless_requests(self, epoch: int, first: int) -> Iterator[BatchRequest]:
        while True:
            yield from self.schedule.requests(epoch, first)
            epoch, first = epoch + 1, 0

    def validation(self) -> Iterator[Batch]:
        """Yield this rank's batches of the held-out parts, if there are any; they are always the same.

        Raises:
            UserError: if fewer samples are held out than there are ranks, or a file cannot be fetched or is
                damaged.
        """
        for request in self.schedule.validation_requests():
            # In this process: validation is rare and short, and must not disturb the prefetched training
            # batches.
            item = self.dataset[request]
            if isinstance(item, Exception):
                raise item
            yield self._unpack(item)

    def _end_processes(self) -> None:
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def close(self) -> None:
        """End the loader processes, and drop the connections to the store."""
        self._end_processes()
        for source in self.corpus.sources:
            source.dataset.close()
        # The handler holds this object, and with it the open files, until the interpreter ends.
        atexit.unregister(self.close)
