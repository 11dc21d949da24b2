"""Find duplicates across a whole dataset with bounded memory.

Exact duplicates have the same 64-bit hash (XXH3) of the file's bytes. Near duplicates have 64-bit perceptual
hashes (pHash, package ImageHash) within a Hamming distance d. In both cases a row is dropped if a row with a
smaller id is a duplicate of it, so the result does not depend on the order of work. (Near duplicates are
judged against all rows that are not exact duplicates, so of a chain a ~ b ~ c only a stays.)

Near duplicates are found by blocks: two hashes within d bits agree on at least m of d + m blocks, so each
choice of m blocks is one pass in which only rows with equal keys are compared; m grows with the number of
rows so that keys stay selective. The rows of a pass are stored in temporary files, which are split by key
into groups of at most `GROUP_ROWS` rows; one group is in memory at a time (0.5 GB). Where many images are
alike, keys with many rows are cut again (`runs`), and so are those with few rows if there are so many of
them that a row would take more than `runs.ROW_COMPARISONS`. Pairs that an earlier pass compares are left
out where that is known without comparing them (`near_in_group`).

No bound on the comparisons holds for all hashes: 2^14 hashes that differ in 20 bits only can be four bits
apart from one another, and then most pairs agree on the blocks of some pass, however these are chosen.

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

from data_prep.plan import runs
from data_prep.plan.runs import Cut, Runs, mixed
from model.common.files import naming_full_disk

EXACT = "dedupe: same file"
NEAR = "dedupe: looks the same"

GROUP_ROWS = 1 << 22
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
    search = Runs(rows)
    places = np.sort(search.different(_with_equal_keys(rows["hash"] & mask)))

    # The distance of two hashes is even if and only if both have an odd number of ones, or both an even one.
    # A pHash has 32 ones unless coefficients are equal, so two of them are never three bits apart.
    odd = np.bitwise_count(rows["hash"][places]).astype(np.int64) & 1
    same = distance - distance % 2
    other = distance - (distance + 1) % 2
    differing = _blocks_left_out(blocks, distance)
    budget = len(rows) * runs.ROW_COMPARISONS / math.comb(distance + len(blocks), distance)
    if differing <= same:
        search.find(Cut(places, odd, mask, ~mask, budget), same)
    if differing <= other:
        left = max(0.0, budget - search.comparisons)
        search.find(Cut(places, np.zeros(len(places), np.int64), mask, ~mask, left, odd), other)
    return search.rows["id"][search.duplicate], search.comparisons


def _with_equal_keys(keys: np.ndarray) -> np.ndarray:
    """Return the places, int64 [M], of all keys that occur more than once."""
    order = np.argsort(keys)
    equal = keys[order[1:]] == keys[order[:-1]]
    return order[np.append(equal, False) | np.append(False, equal)] if len(keys) else order


def _blocks_left_out(blocks: Sequence[tuple[int, int]], distance: int) -> int:
    """Return the number of blocks before the last of a choice that are not in it."""
    ends = [end for _, end in _all_blocks(distance + len(blocks))]
    return ends.index(blocks[-1][1]) + 1 - len(blocks)


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
