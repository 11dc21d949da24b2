"""The rows of each global batch: pure functions of integers, the same on any number of processes.

An epoch of one bucket is a fixed sequence of rows. Its parts are shuffled and concatenated. The rows are cut
into one contiguous span per canonical node, and inside a span they are shuffled within windows of
`shuffle_parts` parts. Global batch `i` of a bucket takes the next `global_batch / canonical_nodes` rows of
each span; those of node `c` are slice `c` of the batch. So a machine whose ranks own whole spans reads only
its own parts (and one that it shares with its neighbor where a span begins or ends inside a part). The rows
that do not fill a batch, fewer than one batch per bucket, are left over; another epoch leaves out others.

Memory is a few bytes per part and one byte per batch, never something per sample: a billion samples cost
megabytes.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

PLANNER = 1
"""Version of the order; a position in an epoch is valid only under the version that made it."""
_BLOCK = 4096
"""Batches between two stored counts of the batches of each bucket so far."""

Integers = NDArray[np.int64]


def _philox(seed: int, epoch: int, label: str, index: int) -> np.random.Philox:
    """Return a counter-based stream that no other combination of the arguments has."""
    # Not Python's `hash`, which differs between processes.
    name = xxhash.xxh64_intdigest(label)
    # The lowest word of the counter stays 0: it counts the numbers that are taken from the stream.
    return np.random.Philox(counter=[0, index, epoch, 0], key=[seed % 2**64, name])


def _permutation(seed: int, epoch: int, label: str, index: int, length: int) -> Integers:
    """Return a permutation of `length` items.

    It sorts raw words, which numpy never changes, unlike `Generator.permutation`.
    """
    # `stable` fixes the order of equal words, so the result does not depend on numpy's sorting method.
    return np.argsort(_philox(seed, epoch, label, index).random_raw(length), kind="stable")


def sample_rng(seed: int, epoch: int, id: int, stream: str) -> np.random.Generator:
    """Return the random numbers of one sample in one epoch for one purpose: Philox keyed by all arguments."""
    # The stream is in the counter, because the key has no room beside seed and id.
    counter = [0, 0, epoch, xxhash.xxh64_intdigest(stream)]
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed % 2**64, id]))


def batch_numbers(seed: int, epoch: int, stream: str, index: int, count: int) -> list[float]:
    """Return `count` numbers, uniform in [0, 1), of a global batch for one purpose: the same on all ranks."""
    # Raw words, which numpy never changes; 53 bits are what a double holds.
    return [int(word >> 11) / 2**53 for word in _philox(seed, epoch, stream, index).random_raw(count)]


def sample_seed(seed: int, epoch: int, id: int, stream: str) -> int:
    """Return 64 bits that depend on all arguments, for generators that take one number as their seed."""
    return xxhash.xxh64_intdigest(struct.pack("<QQQ", seed % 2**64, epoch, id) + stream.encode())


Origins = tuple[Integers, Integers]
"""Number of the dataset, and of the pass over it, of parts [P] that come from several datasets."""


def _interleave(order: Integers, sizes: Integers, sources: Integers, passes: Integers) -> Integers:
    """Reorder the parts so that each dataset's are read pass by pass, evenly through the epoch."""
    # Each part gets a place in [0, 1], the middle of its rows among those of its dataset. Sorting all parts
    # by place mixes the datasets evenly, whatever their sizes.
    middles = np.empty(len(order))
    for source in np.unique(sources):
        parts = order[sources[order] == source]
        # Pass by pass, so that no row comes a second time before all others came once.
        parts = parts[np.argsort(passes[parts], kind="stable")]
        ends = np.cumsum(sizes[parts])
        middles[parts] = (ends - sizes[parts] / 2) / max(int(ends[-1]), 1)
    return order[np.argsort(middles[order], kind="stable")]


def _share(size: int, number: int, count: int) -> tuple[int, int]:
    """Return begin and end of one of `count` equal shares of `size`."""
    return size * number // count, size * (number + 1) // count


@dataclass(frozen=True)
class PlannedRows:
    """Rows of one bucket, in the order of the batch."""

    bucket: str
    parts: Integers
    """[G]: index of each row's part in the bucket's list of parts."""
    rows: Integers
    """[G]: row in that part."""


class BucketOrder:
    """The order of one bucket's rows in one epoch."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        bucket: str,
        rows: Sequence[int] | Integers,
        batch: int,
        nodes: int,
        shuffle_parts: int,
        origins: Origins | None = None,
    ) -> None:
        sizes = np.asarray(rows, np.int64)
        self.seed, self.epoch, self.bucket = seed, epoch, bucket
        self.batch, self.nodes, self.shuffle_parts = batch, nodes, shuffle_parts
        self.share = batch // nodes
        """Rows of a batch that come from one canonical node's span."""

        self.order = _permutation(seed, epoch, f"parts {bucket}", 0, len(sizes))
        if origins is not None:
            self.order = _interleave(self.order, sizes, *origins)
        # Position of each part's first row in the shuffled concatenation; a binary search in it finds any
        # row.
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self.order])])
        self.total = int(self.starts[-1])
        self.batches = self.total // batch
        self._windows: dict[int, tuple[int, int, NDArray[np.int32]]] = {}

    def _span(self, node: int) -> tuple[int, int]:
        return _share(self.total, node, self.nodes)

    def _part_at(self, position: Integers | int) -> Integers:
        return np.searchsorted(self.starts, position, side="right") - 1

    def _bounds(self, node: int, position: int) -> tuple[int, int, int, int]:
        """Return first and last + 1 position, first and last + 1 part, of the window around `position`."""
        low, high = self._span(node)
        first = int(self._part_at(low))
        last = int(self._part_at(high - 1)) + 1
        # Windows are counted from the span's first part, so spans of different nodes have no window in
        # common.
        begin = first + (int(self._part_at(position)) - first) // self.shuffle_parts * self.shuffle_parts
        end = min(begin + self.shuffle_parts, last)
        # A part that two spans share is cut at the border: each node takes only its own rows of it.
        return max(low, int(self.starts[begin])), min(high, int(self.starts[end])), begin, end

    def _window(self, node: int, position: int) -> tuple[int, int, NDArray[np.int32]]:
        """Return first and last + 1 position of the window that contains `position`, and its permutation.

        The last window of each node is kept, since batches walk through it.
        """
        window = self._windows.get(node)
        if window is None or not window[0] <= position < window[1]:
            low, high, _, _ = self._bounds(node, position)
            # The first position identifies the window in the stream of random numbers, so no two windows
            # share one.
            permutation = _permutation(self.seed, self.epoch, f"rows {self.bucket}", low, high - low)
            # int32 halves the memory; a window has far fewer than 2**31 rows.
            window = self._windows[node] = low, high, permutation.astype(np.int32)
        return window

    def _node_slices(self, index: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (node, first position, last + 1) of the elements [start, stop) of batch `index`."""
        slices = []
        for node in range(start // self.share, (stop - 1) // self.share + 1):
            first = node * self.share  # in the batch
            low = self._span(node)[0] + index * self.share - first
            slices.append((node, low + max(start, first), low + min(stop, first + self.share)))
        return slices

    def take(self, index: int, start: int, stop: int) -> PlannedRows:
        """Return elements [start, stop) of the bucket's batch `index`."""
        pieces = []
        for node, position, end in self._node_slices(index, start, stop):
            while position < end:
                low, high, permutation = self._window(node, position)
                # A batch may cross the end of a window, and then takes the rest from the next one.
                until = min(end, high)
                pieces.append(low + permutation[position - low : until - low].astype(np.int64))
                position = until

        positions = np.concatenate(pieces)
        places = self._part_at(positions)
        return PlannedRows(self.bucket, self.order[places], positions - self.starts[places])

    def ahead(self, index: int, start: int, stop: int) -> list[int]:
        """Return parts to fetch while batch `index` is read.

        Each step through a window names its share of the next window's parts.
        """
        parts = []
        for node, position, _ in self._node_slices(index, start, stop):
            low, high, _, _ = self._bounds(node, position)
            # The last window of a span has no next one.
            if high >= self._span(node)[1]:
                continue
            # All of the node's step, not only this rank's piece of it: so ranks of one node name the same
            # parts, once per step.
            step = self._span(node)[0] + index * self.share
            _, _, first, last = self._bounds(node, high)

            # In proportion to the progress through the window: the downloads are spread over its steps, and
            # the last step completes them.
            begin = first + (last - first) * (max(step, low) - low) // (high - low)
            end = first + (last - first) * (min(step + self.share, high) - low) // (high - low)
            parts += self.order[begin:end].tolist()
        return parts


class EpochPlan:
    """All global batches of one epoch, each of one bucket; the buckets are mixed evenly at random."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        buckets: Mapping[str, Sequence[int] | Integers],
        global_batch: int | Mapping[str, int],
        canonical_nodes: int = 1,
        shuffle_parts: int = 8,
        origins: Mapping[str, Origins] | None = None,
    ) -> None:
        """Plan an epoch.

        Args:
            seed: seed of the order.
            epoch: number of the epoch, from 0.
            buckets: bucket -> rows of each of its parts.
            global_batch: samples per batch, one number or one per bucket; a multiple of `canonical_nodes`.
            canonical_nodes: see the module's description.
            shuffle_parts: parts whose rows are shuffled together.
            origins: bucket -> origins of its parts, if they come from several datasets: each dataset is then
                spread evenly over the epoch.

        Raises:
            ValueError: if a number is out of range.
        """
        sizes = dict.fromkeys(buckets, global_batch) if isinstance(global_batch, int) else dict(global_batch)
        for bucket in buckets:
            if sizes[bucket] < 1 or canonical_nodes < 1 or sizes[bucket] % canonical_nodes:
                raise ValueError(
                    f"a batch of {sizes[bucket]} rows of {bucket} is no multiple of {canonical_nodes} nodes"
                )
        if shuffle_parts < 1:
            raise ValueError(f"shuffle_parts={shuffle_parts} is below 1")

        self.orders = [
            BucketOrder(
                seed,
                epoch,
                bucket,
                buckets[bucket],
                sizes[bucket],
                canonical_nodes,
                shuffle_parts,
                (origins or {}).get(bucket),
            )
            # The caller's order must not matter: the labels below are indices into this list.
            for bucket in sorted(buckets)
        ]
        counts = [order.batches for order in self.orders]
        # The smallest integers that fit: this array has one element per batch of the epoch.
        labels = np.repeat(np.arange(len(counts), dtype=np.uint16 if len(counts) > 256 else np.uint8), counts)
        self._labels = labels[_permutation(seed, epoch, "buckets", 0, len(labels))]

        # Batches of each bucket before each block, so that no lookup counts from the epoch's beginning.
        starts = range(0, len(labels), _BLOCK)
        blocks = [np.bincount(self._labels[at : at + _BLOCK], minlength=len(counts)) for at in starts]
        self._before = np.cumsum([np.zeros(len(counts), np.int64), *blocks], axis=0)

    def __len__(self) -> int:
        return len(self._labels)

    def _locate(self, index: int) -> tuple[BucketOrder, int]:
        """Return the bucket of global batch `index`, and the batch's number among those of its bucket."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of an epoch of {len(self)} batches")
        label, block = self._labels[index], index // _BLOCK
        in_block = np.count_nonzero(self._labels[block * _BLOCK : index] == label)
        return self.orders[label], int(self._before[block, label] + in_block)

    def batch(self, index: int, rank: int = 0, world: int = 1) -> PlannedRows:
        """Return rank `rank`'s slice, of `world` equal ones, of global batch `index`."""
        order, number = self._locate(index)
        return order.take(number, *_share(order.batch, rank, world))

    def ahead(self, index: int, rank: int = 0, world: int = 1) -> tuple[str, list[int]]:
        """Return bucket and parts that a rank should fetch while it reads global batch `index`."""
        order, number = self._locate(index)
        return order.bucket, order.ahead(number, *_share(order.batch, rank, world))

    def left_over(self) -> dict[str, int]:
        """Bucket -> rows that this epoch leaves out because they do not fill a batch."""
        return {order.bucket: order.total - order.batches * order.batch for order in self.orders}
