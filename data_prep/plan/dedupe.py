"""Find duplicates across a whole dataset with bounded memory.

Exact duplicates have the same 64-bit hash (XXH3) of the file's bytes. Near duplicates have 64-bit perceptual
hashes (pHash, package ImageHash) within a Hamming distance d. In both cases a row is dropped if a row with a
smaller id is a duplicate of it, so the result does not depend on the order of work. (Near duplicates are
judged against all rows that are not exact duplicates, so of a chain a ~ b ~ c only a stays.)

Near duplicates are found by blocks: two hashes within d bits agree on at least m of d + m blocks, so each
choice of m blocks is one pass in which only rows with equal keys are compared; m grows with the number of
rows so that keys stay selective. The rows of a pass are stored in temporary files, which are split by key
into groups of at most `GROUP_ROWS` rows; one group is in memory at a time (0.5 GB). Where many images are
alike, keys with many rows are cut again (`_Runs`).

XXH3's 64 bits give an expected 0.03 false duplicates among 1 billion rows.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

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
        yield near_in_group(group, mask, distance)[0]


def block_choices(rows: int, distance: int) -> list[tuple[tuple[int, int], ...]]:
    """Return all choices of m of d + m blocks of the 64 bits, with blocks as (start, end).

    m is the smallest number for which keys have at least log2(rows) bits.
    """
    # With as many key values as rows, few unrelated rows share a key. Bits beyond 32 would only add passes.
    key_bits = min(32.0, math.log2(max(2, rows)))
    matching = next(m for m in range(1, 65) if 64 * m / (distance + m) >= key_bits)
    count = distance + matching
    edges = [round(64 * number / count) for number in range(count + 1)]
    return list(itertools.combinations(itertools.pairwise(edges), matching))


def bit_mask(blocks: Sequence[tuple[int, int]]) -> np.uint64:
    """Return the bits of some blocks."""
    return np.uint64(sum(((1 << (end - start)) - 1) << start for start, end in blocks))


def near_in_group(rows: np.ndarray, mask: np.uint64, distance: int) -> tuple[np.ndarray, int]:
    """Find rows near a row with a smaller id, among those that agree with it on the bits of `mask`.

    Args:
        rows: `ROW` [N].
        mask: bits of the keys.
        distance: maximum Hamming distance.

    Returns:
        The ids of the rows found, int64 [M], and the number of comparisons.
    """
    runs = _Runs(rows[np.argsort(rows["id"], kind="stable")], distance)
    runs.find(np.arange(len(rows)), np.zeros(len(rows), np.int64), mask, ~mask)
    return runs.rows["id"][runs.duplicate], runs.comparisons


class _Runs:
    """Comparison of all rows with equal keys, which form a run.

    Images that are alike, such as products on white, agree on most bits, so some keys have very many rows.
    The rows of a long run that are not near one of the `RUN_ROWS` rows before them are cut again, by the bits
    outside of the key: what holds for all 64 bits holds for these, so no pair is missed. A run is cut only if
    that at least halves the pairs to compare, so cutting never costs more than comparing all.
    """

    def __init__(self, rows: np.ndarray, distance: int) -> None:
        self.rows = rows
        """`ROW` [N], sorted by id."""
        self.duplicate = np.zeros(len(rows), bool)
        self.comparisons = 0
        self._distance = distance

    def find(self, places: np.ndarray, runs: np.ndarray, key: np.uint64, free: np.uint64) -> None:
        """Mark the duplicates among some rows.

        Args:
            places: rows, int64 [n].
            runs: run of each row, int64 [n]; only rows of one run are compared.
            key: bits by which the runs are cut first.
            free: bits on which the rows of a run may still differ after that.
        """
        order, runs, before = self._sort(places, runs, key)
        places = places[order]
        self._compare(places, np.minimum(before, RUN_ROWS))

        left = ~self.duplicate[places] & (before > RUN_ROWS)
        is_long = np.bincount(runs[left], minlength=int(runs.max(initial=0)) + 1)[runs] > 0
        if is_long.any():
            self._cut(places[is_long], runs[is_long], free)

    def _sort(
        self, places: np.ndarray, runs: np.ndarray, key: np.uint64
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut runs by a key.

        Returns:
            The order of the rows by new run and id; and in this order the number of the new run and of the
            rows of it that come before, all int64 [n].
        """
        keys = self.rows["hash"][places] & key
        order = np.lexsort((places, keys, runs))
        runs, keys = runs[order], keys[order]
        is_new = np.ones(len(places), bool)
        is_new[1:] = (runs[1:] != runs[:-1]) | (keys[1:] != keys[:-1])
        starts = np.flatnonzero(is_new)
        number = np.cumsum(is_new) - 1
        return order, number, np.arange(len(places)) - starts[number]

    def _compare(self, places: np.ndarray, before: np.ndarray) -> None:
        """Compare rows with those before them.

        A row is compared with the row `lag` places before it, for growing lags; each lag looks only at rows
        whose run reaches that far back.

        Args:
            places: rows, int64 [n], sorted by run and then id.
            before: number of rows before each to compare it with, int64 [n].
        """
        hashes = self.rows["hash"][places]
        candidates = np.flatnonzero((before > 0) & ~self.duplicate[places])
        lag = 1
        while len(candidates):
            # In chunks, because every comparison copies the hashes of both rows.
            for start in range(0, len(candidates), PAIR_ROWS):
                chunk = candidates[start : start + PAIR_ROWS]
                difference = hashes[chunk] ^ hashes[chunk - lag]
                self.duplicate[places[chunk[np.bitwise_count(difference) <= self._distance]]] = True
            self.comparisons += len(candidates)
            lag += 1
            # A row that is known to be a duplicate needs no further comparison.
            candidates = candidates[(before[candidates] >= lag) & ~self.duplicate[places[candidates]]]

    def _cut(self, places: np.ndarray, runs: np.ndarray, free: np.uint64) -> None:
        """Mark the duplicates among the rows of long runs."""
        # Of equal hashes only the first row can be near a row that the others are not near.
        order, _, copies = self._sort(places, runs, ~np.uint64(0))
        self.duplicate[places[order[copies > 0]]] = True
        places, runs = places[order[copies == 0]], runs[order[copies == 0]]

        order, runs, before = self._sort(places, runs, np.uint64(0))
        places = places[order]
        bits = [bit for bit in range(64) if int(free) >> bit & 1]
        choices = _choose_bits(bits, self._distance, int(before.max()) + 1)
        pairs = np.zeros((1 + len(choices), int(runs[-1]) + 1))
        pairs[0] = np.bincount(runs, before * ~self.duplicate[places])
        for number, blocks in enumerate(choices, 1):
            order, _, less = self._sort(places, runs, blocks)
            pairs[number] = np.bincount(runs[order], less * ~self.duplicate[places[order]])

        is_cut = ((2 * pairs[1:].sum(0) <= pairs[0]) & bool(choices))[runs]
        self._compare(places[~is_cut], before[~is_cut])
        if is_cut.any():
            for blocks in choices:
                self.find(places[is_cut], runs[is_cut], blocks, free & ~blocks)


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
