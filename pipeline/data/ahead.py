"""Batches are taken one ahead, so that a device copies and unpacks the next one while it computes."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.loader import TrainingData
from pipeline.data.position import Position

T = TypeVar("T")


class Ahead(Iterator[T], Generic[T]):
    """The items of an iterator, each of which may be fetched before it is asked for.

    On a GPU an item is made on a stream of its own, beside what is queued already. Elsewhere it is made at
    once: the items are the same.
    """

    def __init__(
        self, items: Iterator[T], device: torch.device, tensors: Callable[[T], Iterable[Tensor]]
    ) -> None:
        """Fetch nothing yet.

        Args:
            items: makes the items, without an end.
            device: where they are made.
            tensors: returns the tensors of an item.
        """
        self._items, self._tensors = items, tensors
        self._fetched: list[T | Exception] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._seconds = 0.0

    def fetch(self) -> None:
        """Make the next item, if that is not done yet; an error waits until it is asked for."""
        if self._fetched:
            return

        began = time.monotonic()
        try:
            # With no stream it is the current one.
            with torch.cuda.stream(self._stream):
                self._fetched.append(next(self._items))
        except Exception as error:  # raised by `__next__`
            self._fetched.append(error)
        self._seconds += time.monotonic() - began

    def __next__(self) -> T:
        """Return the next item, which the current stream then may read."""
        self.fetch()
        item = self._fetched.pop()

        if isinstance(item, Exception):
            raise item
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in self._tensors(item):
                # Its memory belongs to the other stream, which would give it away too early.
                tensor.record_stream(current)
        return item

    def waited(self) -> float:
        """Return the seconds that fetching has taken since this was last asked for."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def batches_ahead(data: TrainingData, position: Position | None) -> Ahead[tuple[Batch, Position]]:
    """Return the batches of `TrainingData.batches`, to be fetched ahead."""
    return Ahead(data.batches(position), data.device, lambda item: item[0].tensors())
