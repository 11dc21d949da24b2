"""Work in several processes: results in order, bounded memory, and a crashed process costs one item, not the job."""

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

IN_FLIGHT = 2
"""Chunks a process: one at work, one waiting."""


class Workers(Generic[Context, Item, Result]):
    """Applies `function(context, chunk)` to chunks of items in `processes` processes (0 = here); the context is sent once.

    A chunk whose process dies (a decoder that crashes, or is killed for its memory) is tried again alone, then item by item,
    each time in a new process; for an item that kills even that, `lost(item)` is the result.
    """

    def __init__(
        self,
        function: Callable[[Context, Sequence[Item]], list[Result]],
        context: Context,
        lost: Callable[[Item], Result],
        processes: int,
    ) -> None:
        self._function = function
        self._context = context
        self._lost = lost
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers[Context, Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Sequence[Item]]) -> Iterator[tuple[Sequence[Item], list[Result]]]:
        """Each chunk with its results, in order; reads ahead by a few chunks only."""
        if self._processes == 0:
            for chunk in chunks:
                yield chunk, self._function(self._context, chunk)
            return
        waiting: deque[tuple[Sequence[Item], Future[list[Result]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._submit(chunk)))
            if len(waiting) > IN_FLIGHT * self._processes:
                yield self._finished(*waiting.popleft())
        while waiting:
            yield self._finished(*waiting.popleft())

    def _submit(self, chunk: Sequence[Item]) -> "Future[list[Result]]":
        if self._pool is None:
            self._pool = self._make_pool(self._processes)
        try:
            return self._pool.submit(_call, self._function, chunk)
        except BrokenProcessPool:
            self._pool = self._make_pool(self._processes)
            return self._pool.submit(_call, self._function, chunk)

    def _finished(self, chunk: Sequence[Item], future: "Future[list[Result]]") -> tuple[Sequence[Item], list[Result]]:
        try:
            return chunk, future.result()
        except BrokenProcessPool:
            return chunk, self._alone(chunk)

    def _alone(self, chunk: Sequence[Item]) -> list[Result]:
        try:
            with self._make_pool(1) as pool:
                return pool.submit(_call, self._function, chunk).result()
        except BrokenProcessPool:
            if len(chunk) == 1:
                return [self._lost(chunk[0])]
            return [result for item in chunk for result in self._alone([item])]

    def _make_pool(self, processes: int) -> ProcessPoolExecutor:
        # A fork would copy the connections and threads of this process; the fork server is a clean one.
        context = multiprocessing.get_context("forkserver")
        return ProcessPoolExecutor(processes, context, initializer=_keep, initargs=(self._context,))


_kept: list[Any] = []
"""In a worker process: the context that it was started with."""


def _keep(context: Any) -> None:
    _kept[:] = [context]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes would wait for work for ever when the process that gives it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, Sequence[Any]], list[Any]], chunk: Sequence[Any]) -> list[Any]:
    return function(_kept[0], chunk)
