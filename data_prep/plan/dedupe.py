"""Find duplicates across a whole dataset with bounded memory.

Exact duplicates have the same 64-bit hash (XXH3) of the file's bytes. Near duplicates have 64-bit perceptual
hashes (pHash, package ImageHash) within a Hamming distance d. In both cases a row is dropped if a row with a
smaller id is a duplicate of it, so the result does not depend on the order of work. (Near duplicates are
judged against all rows that are not exact duplicates, so of a chain a ~ b ~ c only a stays.)

Near duplicates are found by blocks: two hashes within d bits agree on at least m of d + m blocks, so each
choice of m blocks is one pass in which only rows with equal keys are compared; m grows with the number of
rows so that keys stay selective. The rows of a pass are stored in temporary files, which are split by key
into groups of at most `GROUP_ROWS` rows; one group is in memory at a time (0.5 GB). Where many images are
alike, keys with many rows are cut again (`_Runs`), and pairs that an earlier pass compares are left out where
that is known without comparing them (`near_in_group`).

XXH3's 64 bits give an expected 0.03 false duplicates among 1 billion rows.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import imagehash
import numpy as np
from PIL import Image

from model.common.files import naming_full_disk

EXACT = "dedupe: same file"
NEAR = "dedupe: looks the same"

GROUP_ROWS = 1 << 22
RUN_ROWS = 16
"""Rows with equal keys above which a run is cut again."""
PAIR_ROWS = 1 << 20
"""Maximum number of pairs compared at once."""
ROW = np.dtype([("hash", "<u8"), ("id", "<i8")])
HASH_SIDE = 64
"""Side to which an image is reduced before its perceptual hash; pHash itself reduces it further, to 32."""
CLIP_BITS = (22, 21, 21)
"""Bits of a clip's hash from its first, middle and last frame."""
LOWEST_FREQUENCIES = sorted(itertools.product(range(8), range(8)), key=lambda place: (sum(place), place))
"""Places of pHash's bits, by the frequency of their coefficient."""


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit pHash of an RGB image."""
    bits = imagehash.phash(image).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def clip_hash(frames: Sequence[np.ndarray]) -> int:
    """Return 64 bits of the pHashes of three frames of a clip, each uint8 [H, W, 3]: those of the lowest
    frequencies, 22 of the first frame and 21 of each other one.

    So a clip has as many bits as an image, and one search finds the near duplicates of both. If all three
    frames are the same, the bits say less: clips without motion are for `clips.min_motion` to drop.
    """
    bits: list[bool] = []

    for frame, count in zip(frames, CLIP_BITS, strict=True):
        hash = imagehash.phash(Image.fromarray(frame)).hash
        bits += [bool(hash[place]) for place in LOWEST_FREQUENCIES[:count]]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Spool:
    """A temporary file of (hash, id) rows in the order of ids."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.rows = 0
        self._file: BinaryIO = self.path.open("wb")

    def add(self, hashes: np.ndarray, ids: np.ndarray) -> None:
        """Append rows.

        Args:
            hashes: uint64 [N].
            ids: int64 [N].

        Raises:
            UserError: if the disk is full.
        """
        rows = np.empty(len(ids), ROW)
        rows["hash"] = hashes
        rows["id"] = ids
        with naming_full_disk(self.path):
            self._file.write(rows.tobytes())
            # Flushed, because `read` opens the file again by its path.
            self._file.flush()
        self.rows += len(ids)

    def read(self, chunk_rows: int = GROUP_ROWS // 4) -> Iterator[np.ndarray]:
        """Yield the rows in chunks of at most `chunk_rows`."""
        with self.path.open("rb") as file:
            while data := file.read(chunk_rows * ROW.itemsize):
                yield np.frombuffer(data, ROW)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def first_of_each_hash(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find rows with equal hashes.

    Args:
        rows: `ROW` [N], with different ids.

    Returns:
        The ids of all rows whose hash another row has too, int64 [M]; and for each the smallest id of a row
        with that hash, int64 [M].
    """
    order = np.lexsort((rows["id"], rows["hash"]))
    hashes, ids = rows["hash"][order], rows["id"][order]
    is_first = np.concatenate([np.ones(min(1, len(rows)), bool), hashes[1:] != hashes[:-1]])
    counts = np.diff(np.append(np.flatnonzero(is_first), len(rows)))
    several = np.repeat(counts > 1, counts)
    return ids[several], np.repeat(ids[is_first], counts)[several]


def near_duplicates(spool: Spool, distance: int, group_rows: int = GROUP_ROWS) -> Iterator[np.ndarray]:
    """Yield the ids, int64 [N], of rows that are near a row with a smaller id; ids may occur repeatedly.

    Args:
        spool: perceptual hashes.
        distance: maximum Hamming distance of near duplicates, in bits.
        group_rows: rows in memory at a time.
    """
    # Two hashes within the distance agree on all blocks of at least one choice, so no pair is missed.
    for blocks in block_choices(spool.rows, distance):
        yield from near_in_pass(spool, blocks, distance, group_rows)


def near_in_pass(
    spool: Spool, blocks: Sequence[tuple[int, int]], distance: int, group_rows: int = GROUP_ROWS
) -> Iterator[np.ndarray]:
    """Yield the ids, int64 [N], of rows that are near a row with a smaller id and agree with it on `blocks`.

    Args:
        spool: perceptual hashes.
        blocks: one of `block_choices`.
        distance: maximum Hamming distance of near duplicates, in bits.
        group_rows: rows in memory at a time.
    """
    mask = bit_mask(blocks)
    for group in _groups(spool, lambda rows: mixed(rows["hash"] & mask), group_rows):
        yield near_in_group(group, blocks, distance)[0]


def block_choices(rows: int, distance: int) -> list[tuple[tuple[int, int], ...]]:
    """Return all choices of m of d + m blocks of the 64 bits, with blocks as (start, end).

    m is the smallest number for which keys have at least log2(rows) bits.
    """
    # With as many key values as rows, few unrelated rows share a key. Bits beyond 32 would only add passes.
    key_bits = min(32.0, math.log2(max(2, rows)))
    matching = next(m for m in range(1, 65) if 64 * m / (distance + m) >= key_bits)
    return list(itertools.combinations(_all_blocks(distance + matching), matching))


def _all_blocks(count: int) -> Iterator[tuple[int, int]]:
    """Return `count` blocks of all 64 bits, as (start, end)."""
    return itertools.pairwise(round(64 * number / count) for number in range(count + 1))


def bit_mask(blocks: Sequence[tuple[int, int]]) -> np.uint64:
    """Return the bits of some blocks."""
    return np.uint64(sum(((1 << (end - start)) - 1) << start for start, end in blocks))


def near_in_group(
    rows: np.ndarray, blocks: Sequence[tuple[int, int]], distance: int
) -> tuple[np.ndarray, int]:
    """Find rows near a row with a smaller id, among those that agree with it on `blocks`.

    A pair that agrees on more blocks than a choice has is in several passes, and may be left out of all but
    the first one of `block_choices`: there the blocks that are left out before the last one of the choice
    differ, each in at least one bit.

    Args:
        rows: `ROW` [N].
        blocks: one of `block_choices`.
        distance: maximum Hamming distance.

    Returns:
        The ids of the rows found, int64 [M], and the number of comparisons.
    """
    rows = rows[np.argsort(rows["id"], kind="stable")]
    mask = bit_mask(blocks)
    runs = _Runs(rows)
    places = runs.different(_with_equal_keys(rows["hash"] & mask))

    # The distance of two hashes is even if and only if both have an odd number of ones, or both an even one.
    # A pHash has 32 ones unless coefficients are equal, so two of them are never three bits apart.
    odd = np.bitwise_count(rows["hash"][places]).astype(np.int64) & 1
    same = distance - distance % 2
    other = distance - (distance + 1) % 2
    differing = _blocks_left_out(blocks, distance)
    if differing <= same:
        runs.find(places, odd, mask, ~mask, same)
    if differing <= other:
        runs.find(places, np.zeros(len(places), np.int64), mask, ~mask, other, odd)
    return runs.rows["id"][runs.duplicate], runs.comparisons


def _with_equal_keys(keys: np.ndarray) -> np.ndarray:
    """Return the places, int64 [M], of all keys that occur more than once."""
    order = np.argsort(keys)
    equal = keys[order[1:]] == keys[order[:-1]]
    return order[np.append(equal, False) | np.append(False, equal)] if len(keys) else order


def _blocks_left_out(blocks: Sequence[tuple[int, int]], distance: int) -> int:
    """Return the number of blocks before the last of a choice that are not in it."""
    ends = [end for _, end in _all_blocks(distance + len(blocks))]
    return ends.index(blocks[-1][1]) + 1 - len(blocks)


class _Pairs(NamedTuple):
    """Pairs to compare: each row with some neighboring rows of the same order."""

    places: np.ndarray
    """Rows, int64 [n]."""
    runs: np.ndarray
    """Run of each row, ascending, int64 [n]; only rows of one run are compared."""
    ends: np.ndarray
    """Position behind the last row to compare each row with, int64 [n]."""
    counts: np.ndarray
    """Number of rows to compare each row with, int64 [n]."""


class _Runs:
    """Comparison of all rows with equal keys, which form a run.

    Images that are alike, such as products on white, agree on most bits, so some keys have very many rows.
    The rows of a long run that are not near one of the `RUN_ROWS` rows before them are cut again, by the bits
    outside of the key: what holds for all 64 bits holds for these, so no pair is missed. A run is cut only if
    that at least halves the pairs to compare, so cutting never costs more than comparing all.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        """`ROW` [N], sorted by id."""
        self.duplicate = np.zeros(len(rows), bool)
        self.comparisons = 0

    def different(self, places: np.ndarray) -> np.ndarray:
        """Return the first row of each hash among some rows; mark the others, which need no comparison."""
        order = places[np.lexsort((places, self.rows["hash"][places]))]
        hashes = self.rows["hash"][order]
        is_copy = np.append(np.zeros(min(1, len(order)), bool), hashes[1:] == hashes[:-1])
        self.duplicate[order[is_copy]] = True
        return order[~is_copy]

    def find(
        self,
        places: np.ndarray,
        runs: np.ndarray,
        key: np.uint64,
        free: np.uint64,
        distance: int,
        sides: np.ndarray | None = None,
    ) -> None:
        """Mark the duplicates among some rows.

        Args:
            places: rows, int64 [n].
            runs: run of each row, int64 [n]; only rows of one run are compared.
            key: bits by which the runs are cut first.
            free: bits on which the rows of a run may still differ after that.
            distance: maximum Hamming distance.
            sides: 0 or 1 for each row, int64 [n], if only rows of different sides are compared.
        """
        order, pairs = self._pairs(places, runs, key, sides)
        self._compare(pairs._replace(counts=np.minimum(pairs.counts, RUN_ROWS)), distance, sides is None)

        left = pairs.counts > RUN_ROWS
        if sides is None:
            left &= ~self.duplicate[pairs.places]
        is_long = np.bincount(pairs.runs[left], minlength=int(pairs.runs.max(initial=0)) + 1)[pairs.runs] > 0
        if is_long.any():
            sides = None if sides is None else sides[order][is_long]
            self._cut(pairs.places[is_long], pairs.runs[is_long], free, distance, sides)

    def _pairs(
        self, places: np.ndarray, runs: np.ndarray, key: np.uint64, sides: np.ndarray | None
    ) -> tuple[np.ndarray, _Pairs]:
        """Cut runs by a key.

        Returns:
            The order of the rows by new run, side and id, int64 [n]; and in this order the pairs to compare:
            each row with all before it, or with all of the smaller side.
        """
        keys = self.rows["hash"][places] & key
        order = np.lexsort((places, keys, runs) if sides is None else (places, sides, keys, runs))
        runs, keys = runs[order], keys[order]
        is_new = np.ones(len(places), bool)
        is_new[1:] = (runs[1:] != runs[:-1]) | (keys[1:] != keys[:-1])
        starts = np.flatnonzero(is_new)
        number = np.cumsum(is_new) - 1
        positions = np.arange(len(places))
        if sides is None:
            return order, _Pairs(places[order], number, positions, positions - starts[number])

        sides = sides[order]
        ones = np.bincount(number, sides, len(starts)).astype(np.int64)
        rows = np.diff(np.append(starts, len(places)))
        smaller = (2 * ones < rows).astype(np.int64)
        ends = (starts + np.where(smaller == 1, rows, rows - ones))[number]
        counts = np.where(sides == smaller[number], 0, np.minimum(ones, rows - ones)[number])
        return order, _Pairs(places[order], number, ends, counts)

    def _compare(self, pairs: _Pairs, distance: int, is_later: bool) -> None:
        """Compare pairs, and mark the later row of those that are near.

        A row is compared with the row at `lag` before the end of its pairs, for growing lags; each
        lag looks only at rows that have so many.

        Args:
            pairs: the pairs.
            distance: maximum Hamming distance.
            is_later: each row is the later one of all its pairs.
        """
        places = pairs.places
        hashes = self.rows["hash"][places]
        rows = np.flatnonzero(pairs.counts > 0)
        lag = 1
        while len(rows):
            # In chunks, because every comparison copies the hashes of both rows.
            for start in range(0, len(rows), PAIR_ROWS):
                chunk = rows[start : start + PAIR_ROWS]
                others = pairs.ends[chunk] - lag
                later = np.maximum(places[chunk], places[others])
                # A row that is known to be a duplicate needs no further comparison.
                left = ~self.duplicate[later]
                difference = hashes[chunk[left]] ^ hashes[others[left]]
                self.duplicate[later[left][np.bitwise_count(difference) <= distance]] = True
                self.comparisons += int(left.sum())
            lag += 1
            rows = rows[pairs.counts[rows] >= lag]
            if is_later:
                rows = rows[~self.duplicate[places[rows]]]

    def _cut(
        self,
        places: np.ndarray,
        runs: np.ndarray,
        free: np.uint64,
        distance: int,
        sides: np.ndarray | None,
    ) -> None:
        """Mark the duplicates among the rows of long runs."""
        order, pairs = self._pairs(places, runs, np.uint64(0), sides)
        places, runs = pairs.places, pairs.runs
        sides = None if sides is None else sides[order]
        bits = [bit for bit in range(64) if int(free) >> bit & 1]
        choices = _choose_bits(bits, distance, int(pairs.counts.max()) + 1)
        counts = np.zeros((1 + len(choices), int(runs[-1]) + 1))
        counts[0] = np.bincount(runs, self._open(pairs, sides))
        for number, blocks in enumerate(choices, 1):
            order, less = self._pairs(places, runs, blocks, sides)
            counts[number] = np.bincount(runs[order], self._open(less, sides))

        is_cut = ((2 * counts[1:].sum(0) <= counts[0]) & bool(choices))[runs]
        self._compare(pairs._replace(counts=np.where(is_cut, 0, pairs.counts)), distance, sides is None)
        if is_cut.any():
            sides = None if sides is None else sides[is_cut]
            for blocks in choices:
                self.find(places[is_cut], runs[is_cut], blocks, free & ~blocks, distance, sides)

    def _open(self, pairs: _Pairs, sides: np.ndarray | None) -> np.ndarray:
        """Return the number of rows to compare each row with, int64 [n]: none where it is known to be a
        duplicate and the later row of its pairs."""
        return pairs.counts if sides is not None else pairs.counts * ~self.duplicate[pairs.places]


def _choose_bits(bits: Sequence[int], distance: int, longest: int) -> list[np.uint64]:
    """Return masks of some of `bits`, of which two hashes within `distance` agree on at least one.

    Args:
        bits: the bits; there is no such mask if they are not more than `distance`.
        distance: maximum Hamming distance.
        longest: rows of the longest run to be cut by them.
    """
    if len(bits) <= distance:
        return []
    wanted = math.log2(max(1, longest / RUN_ROWS))
    matching = 1
    # More blocks make longer keys, but also more passes.
    while matching < 3 and distance + matching < len(bits):
        if len(bits) * matching / (distance + matching) >= wanted:
            break
        matching += 1

    count = distance + matching
    edges = [round(len(bits) * number / count) for number in range(count + 1)]
    blocks = []
    for start, end in itertools.pairwise(edges):
        blocks.append(sum(1 << bit for bit in bits[start:end]))
    return [np.uint64(sum(choice)) for choice in itertools.combinations(blocks, matching)]


def mixed(keys: np.ndarray) -> np.ndarray:
    """Distribute keys over all 64 bits, so that groups split by the top bits have similar sizes."""
    # Fibonacci hashing: multiplication by 2^64 / golden ratio moves differences of all bits to the top bits.
    with np.errstate(over="ignore"):
        mixed = keys * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ (mixed >> np.uint64(29))


def _groups(
    spool: Spool, key_of: Callable[[np.ndarray], np.ndarray], group_rows: int
) -> Iterator[np.ndarray]:
    """Yield the rows in groups, one in memory at a time; rows with equal keys are in the same group.

    Args:
        spool: the rows.
        key_of: function from rows [N] to their keys, uint64 [N], which are uniform in the top bits.
        group_rows: average size of a group.

    Raises:
        UserError: if the disk is full.
    """
    bits = max(0, math.ceil(math.log2(max(1, spool.rows / group_rows))))
    if bits == 0:
        # All rows fit in memory, so no second copy is written. The empty array serves a spool without rows.
        yield np.concatenate([*spool.read(), np.empty(0, ROW)])
        return

    with tempfile.TemporaryDirectory(dir=spool.path.parent) as folder:
        paths = [Path(folder) / f"{number:05d}" for number in range(2**bits)]

        for rows in spool.read():
            group = (key_of(rows) >> np.uint64(64 - bits)).astype(np.int64)
            # Sorted by group, a chunk is written with one append per group.
            order = np.argsort(group, kind="stable")
            bounds = np.searchsorted(group[order], np.arange(len(paths) + 1))
            for path, (start, end) in zip(paths, itertools.pairwise(bounds.tolist()), strict=True):
                if start < end:
                    with naming_full_disk(path), path.open("ab") as file:
                        file.write(rows[order[start:end]].tobytes())

        for path in paths:
            if path.exists():
                yield np.frombuffer(path.read_bytes(), ROW)
                path.unlink()
