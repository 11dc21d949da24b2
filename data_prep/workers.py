"""A pool of processes with results in order and bounded memory. A crashed process costs one item, not the
job."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNKS_PER_PROCESS = 2
"""Chunks that each process has at most: one in progress and one waiting."""


class Workers(Generic[Context, Item, Result]):
    """Apply `function(context, chunk)` to chunks of items in several processes; the context is sent once.

    If a process dies on a chunk (the decoder crashes, or is killed for its memory), the chunk is tried again
    alone, then item by item, each time in a new process. The result of an item that kills its process even
    then is `lost(item)`.
    """

    def __init__(
        self,
        function: Callable[[Context, Sequence[Item]], list[Result]],
        context: Context,
        lost: Callable[[Item], Result],
        processes: int,
    ) -> None:
        """Start no process yet.

        Args:
            function: returns one result per item of a chunk.
            context: its first argument.
            lost: returns the result of an item that kills its process.
            processes: number of processes; 0 = work in this one.
        """
        self._function = function
        self._context = context
        self._lost = lost
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers[Context, Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        # After an error, nobody waits for the chunks that have not started.
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Sequence[Item]]) -> Iterator[tuple[Sequence[Item], list[Result]]]:
        """Return each chunk with its results, in order; reads only a few chunks ahead."""
        if self._processes == 0:
            # Nothing catches a crash here: a decoder that dies takes the job with it.
            for chunk in chunks:
                yield chunk, self._function(self._context, chunk)
            return

        # Results are yielded in order, so the oldest chunk is the one to wait for.
        waiting: deque[tuple[Sequence[Item], Future[list[Result]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._submit(chunk)))
            if len(waiting) > CHUNKS_PER_PROCESS * self._processes:
                yield self._finish(*waiting.popleft())

        while waiting:
            yield self._finish(*waiting.popleft())

    def _submit(self, chunk: Sequence[Item]) -> "Future[list[Result]]":
        # Processes start with the first chunk, so a task whose work is done already starts none.
        if self._pool is None:
            self._pool = self._make_pool(self._processes)
        try:
            return self._pool.submit(_call, self._function, chunk)
        except BrokenProcessPool:
            # A process died on an earlier chunk, and took the pool with it.
            self._pool = self._make_pool(self._processes)
            return self._pool.submit(_call, self._function, chunk)

    def _finish(
        self, chunk: Sequence[Item], future: "Future[list[Result]]"
    ) -> tuple[Sequence[Item], list[Result]]:
        try:
            return chunk, future.result()
        except BrokenProcessPool:
            return chunk, self._retry(chunk)

    def _retry(self, chunk: Sequence[Item]) -> list[Result]:
        """Work on a chunk in a new process; if that dies as well, on each item."""
        # A crash also loses the chunks of the pool's other processes, which are fine by themselves.
        try:
            # One process alone, so that a crash can only be this chunk's.
            with self._make_pool(1) as pool:
                return pool.submit(_call, self._function, chunk).result()
        except BrokenProcessPool:
            if len(chunk) == 1:
                return [self._lost(chunk[0])]

        results: list[Result] = []
        for item in chunk:
            results += self._retry([item])
        return results

    def _make_pool(self, processes: int) -> ProcessPoolExecutor:
        # A fork would copy the connections and threads of this process; the fork server has none.
        context = multiprocessing.get_context("forkserver")
        return ProcessPoolExecutor(processes, context, initializer=_start, initargs=(self._context,))


_contexts: list[Any] = []
"""The context of this process, if it is a worker."""


def _start(context: Any) -> None:
    """Prepare a worker process."""
    _contexts[:] = [context]
    # A daemon thread, so that it does not keep a worker alive that the pool has shut down.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process does: a killed parent would leave the workers waiting forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"
    parent.join()
    # In a thread, `sys.exit` would end the thread alone.
    os._exit(1)


def _call(function: Callable[[Any, Sequence[Any]], list[Any]], chunk: Sequence[Any]) -> list[Any]:
    # A function of the module, since only those can be sent to a process.
    return function(_contexts[0], chunk)
