"""Which rows make which global batch: pure functions of integers, the same on any number of processes and workers.

An epoch of one bucket is a fixed sequence of rows. Its parts are shuffled and laid end to end; the rows are cut into
`lanes` contiguous spans; inside a span, rows are shuffled within windows of `shuffle_parts` parts. Global batch `i` of a
bucket takes the next `global_batch / lanes` rows of each lane, lane `c` filling slice `c`: a node whose ranks own whole
lanes reads only its own parts (and one shared with its neighbour where a span begins or ends inside a part). The rows
that do not fill a batch, fewer than one batch a bucket, are left over; another epoch leaves out others.

Memory is a few bytes a part and one byte a batch, never something per sample: a billion samples cost megabytes.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

PLANNER = 1
"""Version of the order; a position in an epoch holds only under the version that made it."""
_BLOCK = 4096
"""Batches between two stored counts of what each bucket has given so far."""

Integers = NDArray[np.int64]


def _philox(seed: int, epoch: int, label: str, index: int) -> np.random.Philox:
    """A counter-based stream of its own for each combination of the arguments."""
    name = xxhash.xxh64_intdigest(label)
    return np.random.Philox(counter=[0, index, epoch, 0], key=[seed % 2**64, name])


def _permutation(seed: int, epoch: int, label: str, index: int, length: int) -> Integers:
    """A permutation of `length` items; sorts raw words, which numpy never changes, unlike `Generator.permutation`."""
    return np.argsort(_philox(seed, epoch, label, index).random_raw(length), kind="stable")


def sample_rng(seed: int, epoch: int, id: int, stream: str) -> np.random.Generator:
    """The random numbers of one sample in one epoch for one purpose: Philox keyed by seed, id, epoch and `stream`."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, epoch, xxhash.xxh64_intdigest(stream)], key=[seed % 2**64, id]))


def sample_seed(seed: int, epoch: int, id: int, stream: str) -> int:
    """The same for generators that take one number: 64 bits of a hash over all of them."""
    return xxhash.xxh64_intdigest(struct.pack("<QQQ", seed % 2**64, epoch, id) + stream.encode())


Origins = tuple[Integers, Integers]
"""Of parts [P] that come from several datasets: number of the dataset, and which pass over it."""


def _side_by_side(order: Integers, sizes: Integers, sources: Integers, passes: Integers) -> Integers:
    """The parts in `order`, but so that each dataset's follow pass by pass, and at an even rate through the whole epoch."""
    middles = np.empty(len(order))
    for source in np.unique(sources):
        mine = order[sources[order] == source]
        mine = mine[np.argsort(passes[mine], kind="stable")]
        ends = np.cumsum(sizes[mine])
        middles[mine] = (ends - sizes[mine] / 2) / max(int(ends[-1]), 1)
    return order[np.argsort(middles[order], kind="stable")]


@dataclass(frozen=True)
class Rows:
    """Rows of one bucket, in the order of the batch."""

    bucket: str
    epoch: int
    parts: Integers
    """[G] index of each row's part in the bucket's list of parts."""
    rows: Integers
    """[G] row in that part."""


class BucketOrder:
    """The order of one bucket's rows in one epoch."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        bucket: str,
        rows: Sequence[int] | Integers,
        batch: int,
        lanes: int,
        shuffle_parts: int,
        origins: Origins | None = None,
    ) -> None:
        sizes = np.asarray(rows, np.int64)
        self.seed, self.epoch, self.bucket = seed, epoch, bucket
        self.batch, self.lanes, self.shuffle_parts = batch, lanes, shuffle_parts
        self.order = _permutation(seed, epoch, f"parts {bucket}", 0, len(sizes))
        if origins is not None:
            self.order = _side_by_side(self.order, sizes, *origins)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[self.order])])
        self.total = int(self.starts[-1])
        self.batches = self.total // batch
        self._windows: dict[int, tuple[int, int, NDArray[np.int32]]] = {}

    def _span(self, lane: int) -> tuple[int, int]:
        return self.total * lane // self.lanes, self.total * (lane + 1) // self.lanes

    def _part_of(self, position: Integers | int) -> Integers:
        return np.searchsorted(self.starts, position, side="right") - 1

    def _bounds(self, lane: int, position: int) -> tuple[int, int, int, int]:
        """The window of a lane that holds `position`: its first and last + 1 position, first and last + 1 part."""
        low, high = self._span(lane)
        first = int(self._part_of(low))
        last = int(self._part_of(high - 1)) + 1
        begin = first + (int(self._part_of(position)) - first) // self.shuffle_parts * self.shuffle_parts
        end = min(begin + self.shuffle_parts, last)
        return max(low, int(self.starts[begin])), min(high, int(self.starts[end])), begin, end

    def _window(self, lane: int, position: int) -> tuple[int, int, NDArray[np.int32]]:
        """First position of the window that holds `position`, last + 1, and its permutation; one is kept a lane."""
        kept = self._windows.get(lane)
        if kept is None or not kept[0] <= position < kept[1]:
            low, high, _, _ = self._bounds(lane, position)
            # The first position names the window in the stream of random numbers: no two windows share one.
            permutation = _permutation(self.seed, self.epoch, f"rows {self.bucket}", low, high - low).astype(np.int32)
            kept = self._windows[lane] = low, high, permutation
        return kept

    def _lane_slices(self, index: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(lane, first position, last + 1) of the elements [start, stop) of batch `index`."""
        share = self.batch // self.lanes
        slices = []
        for lane in range(start // share, (stop - 1) // share + 1):
            low = self._span(lane)[0] + index * share - lane * share
            slices.append((lane, low + max(start, lane * share), low + min(stop, (lane + 1) * share)))
        return slices

    def take(self, index: int, start: int, stop: int) -> Rows:
        """Elements [start, stop) of the bucket's batch `index`."""
        taken = []
        for lane, position, end in self._lane_slices(index, start, stop):
            while position < end:
                low, high, permutation = self._window(lane, position)
                until = min(end, high)
                taken.append(low + permutation[position - low : until - low].astype(np.int64))
                position = until
        positions = np.concatenate(taken)
        places = self._part_of(positions)
        return Rows(self.bucket, self.epoch, self.order[places], positions - self.starts[places])

    def ahead(self, index: int, start: int, stop: int) -> list[int]:
        """Parts to fetch while batch `index` is read: a share of the next window's for each step through this one's."""
        parts = []
        share = self.batch // self.lanes
        for lane, position, _ in self._lane_slices(index, start, stop):
            low, high, _, _ = self._bounds(lane, position)
            if high < self._span(lane)[1]:
                # The lane's whole step, not this rank's piece of it: ranks of one lane then name the same parts once a step.
                step = self._span(lane)[0] + index * share
                _, _, first, last = self._bounds(lane, high)
                begin, end = (
                    first + (last - first) * (at - low) // (high - low) for at in (max(step, low), min(step + share, high))
                )
                parts += self.order[begin:end].tolist()
        return parts


class EpochPlan:
    """All global batches of one epoch, each of one bucket, in an order that mixes the buckets evenly at random."""

    def __init__(
        self,
        seed: int,
        epoch: int,
        buckets: Mapping[str, Sequence[int] | Integers],
        global_batch: int | Mapping[str, int],
        lanes: int = 1,
        shuffle_parts: int = 8,
        origins: Mapping[str, Origins] | None = None,
    ) -> None:
        """Plan an epoch.

        Args:
            seed: seed of the order.
            epoch: number of the epoch, from 0.
            buckets: bucket -> rows of each of its parts.
            global_batch: samples a batch, one number or one a bucket; a multiple of `lanes`.
            lanes: canonical nodes; see the module's description.
            shuffle_parts: parts whose rows are shuffled together.
            origins: bucket -> where its parts come from, if from several datasets: each is then spread evenly over the epoch.

        Raises:
            ValueError: a number is out of range.
        """
        sizes = dict.fromkeys(buckets, global_batch) if isinstance(global_batch, int) else dict(global_batch)
        for bucket in buckets:
            if sizes[bucket] < 1 or lanes < 1 or sizes[bucket] % lanes:
                raise ValueError(f"a batch of {sizes[bucket]} rows of {bucket} is not a multiple of {lanes} lanes")
        if shuffle_parts < 1:
            raise ValueError(f"shuffle_parts={shuffle_parts} is below 1")
        self.seed, self.epoch = seed, epoch
        self.orders = [
            BucketOrder(seed, epoch, bucket, buckets[bucket], sizes[bucket], lanes, shuffle_parts, (origins or {}).get(bucket))
            for bucket in sorted(buckets)
        ]
        counts = [order.batches for order in self.orders]
        labels = np.repeat(np.arange(len(counts), dtype=np.uint16 if len(counts) > 256 else np.uint8), counts)
        self._labels = labels[_permutation(seed, epoch, "buckets", 0, len(labels))]
        blocks = [np.bincount(self._labels[at : at + _BLOCK], minlength=len(counts)) for at in range(0, len(labels), _BLOCK)]
        self._given = np.cumsum([np.zeros(len(counts), np.int64), *blocks], axis=0)

    def __len__(self) -> int:
        return len(self._labels)

    def _locate(self, index: int) -> tuple[BucketOrder, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of an epoch of {len(self)} batches")
        label = self._labels[index]
        block = index // _BLOCK
        before = np.count_nonzero(self._labels[block * _BLOCK : index] == label)
        return self.orders[label], int(self._given[block, label] + before)

    def size(self, index: int) -> int:
        """Samples in global batch `index`."""
        return self.orders[self._labels[index]].batch

    def batch(self, index: int, rank: int = 0, world: int = 1) -> Rows:
        """Rank `rank`'s slice, of `world` equal ones, of global batch `index`."""
        order, inside = self._locate(index)
        return order.take(inside, order.batch * rank // world, order.batch * (rank + 1) // world)

    def ahead(self, index: int, rank: int = 0, world: int = 1) -> tuple[str, list[int]]:
        """Bucket and parts that a rank should fetch while it reads global batch `index`."""
        order, inside = self._locate(index)
        return order.bucket, order.ahead(inside, order.batch * rank // world, order.batch * (rank + 1) // world)

    def left_over(self) -> dict[str, int]:
        """Bucket -> rows that this epoch leaves out because they do not fill a batch."""
        return {order.bucket: order.total - order.batches * order.batch for order in self.orders}
