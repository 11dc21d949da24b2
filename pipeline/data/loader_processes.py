"""Processes that read batches for the trainer: how they start, and how they end with it, however it ends."""

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
from typing import Any

import torch
from torch.utils.data import DataLoader

from model.common.errors import UserError
from pipeline.data.batch import PackedBatch
from pipeline.data.dataset import BatchRequest, SnapshotDataset

# Loader processes come from a server that has already imported the trainer's main module, which is intended.
warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package.*")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
_PREFETCHED = 2
"""Batches that each loader process keeps ready."""
_MAX_TMPDIR_LENGTH = 75
"""Maximum length of TMPDIR: Unix socket paths are limited to 107 bytes, and multiprocessing appends 32."""


class LoaderProcesses:
    """Batches in the order of their requests, read by other processes or, without any, by this one."""

    def __init__(
        self, dataset: SnapshotDataset, requests: Iterator[BatchRequest], workers: int, pin_memory: bool
    ) -> None:
        """Start the processes.

        Args:
            dataset: reads a batch.
            requests: the batches; taken a few ahead of the trainer.
            workers: number of processes; 0 = read in this one.
            pin_memory: put batches into page-locked memory.

        Raises:
            UserError: if TMPDIR is too long for the sockets of the processes.
        """
        self._closing: Event | None = None
        self._batches: Iterator[PackedBatch | Exception]
        # An item is a batch already.
        options: dict[str, Any] = {"batch_size": None, "sampler": requests, "pin_memory": pin_memory}
        if not workers:
            self._batches = iter(DataLoader(dataset, **options))
            return

        # Otherwise the first batch fails with `AF_UNIX path too long`, which does not name TMPDIR.
        if len(os.fsencode(tempfile.gettempdir())) > _MAX_TMPDIR_LENGTH:
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()}: over {_MAX_TMPDIR_LENGTH} letters, too many for "
                "the sockets of loader processes: set a shorter one, or data.workers=0"
            )

        # A process that starts with blocked signals keeps them blocked, Python's fork server and resource
        # tracker too: a signal to the whole job step (Slurm's notice before the time limit) must reach only
        # the trainer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the line above may have unblocked some
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_preloaded_modules())
            self._closing = context.Event()
            options |= {"num_workers": workers, "prefetch_factor": _PREFETCHED}
            options |= {"multiprocessing_context": context, "worker_init_fn": _WorkerStart(self._closing)}
            # The processes start here, while the signals are blocked, and inherit the mask.
            self._batches = iter(DataLoader(dataset, **options))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> PackedBatch:
        """Return the next batch.

        Raises:
            UserError: if a loader process has returned one.
            RuntimeError: if a loader process was killed.
        """
        try:
            batch = next(self._batches)
        # torch passes on the broken pipe of a process that was killed, for instance for its use of memory.
        except (EOFError, OSError) as error:
            raise RuntimeError(f"a loader process failed or was killed: {error!r}") from error
        if isinstance(batch, Exception):
            raise batch
        return batch

    def close(self) -> None:
        """End the processes and wait for them."""
        if self._closing is not None:
            # First, so that the processes take a SIGTERM from torch for an intended end.
            self._closing.set()
        self._batches = iter(())  # torch's iterator ends its processes when it is dropped


def _preloaded_modules() -> list[str]:
    """Modules that the server of loader processes imports for all of them: this one, and the main module.

    Loader processes are forked from that clean server, so they inherit no connection, lock, thread or CUDA
    context.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return [__name__, *([main.name] if main else [])]


def become_loader_process() -> None:
    """Ignore signals that are meant for the trainer, and exit as soon as the trainer does, however it ends.

    torch watches the parent instead, which may be a server of processes that in turn waits for this process:
    both would survive a kill of the trainer.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        # `os._exit` ends the process from a thread, even while its main thread waits for a file.
        threading.Thread(target=lambda: (trainer.join(), os._exit(1)), daemon=True).start()
    for number in _SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class _WorkerStart:
    """Sets up a loader process."""

    def __init__(self, closing: Event) -> None:
        self.closing = closing
        self.environment = dict(os.environ)

    def __call__(self, worker: int) -> None:
        """Ignore signals that are meant for the trainer.

        Exit on SIGTERM only if the trainer is closing or has exited.
        """
        # The fork server may have been started with an older environment than the trainer's (credentials,
        # endpoint).
        os.environ.update(self.environment)
        parent = os.getppid()

        def end(number: int, frame: object) -> None:
            if self.closing.is_set() or os.getppid() != parent:
                os._exit(128 + number)

        become_loader_process()
        # In place before the signals are unblocked, so that a SIGTERM that was waiting does not kill the
        # process.
        signal.signal(signal.SIGTERM, end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        # The rank has many loader processes: with one thread per core in each, they would crowd out the
        # trainer.
        torch.set_num_threads(1)
