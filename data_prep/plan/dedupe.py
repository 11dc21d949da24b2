"""Find duplicates across a whole dataset with bounded memory.

Exact duplicates have the same 64-bit hash (XXH3) of the file's bytes. Near duplicates have 64-bit perceptual
hashes (pHash, package ImageHash) within a Hamming distance d. In both cases a row is dropped if a row with a
smaller id is a duplicate of it, so the result does not depend on the order of work. (Near duplicates are
judged against all rows that are not exact duplicates, so of a chain a ~ b ~ c only a stays.)

Hashes are stored in temporary files, which are split by value into groups of at most `GROUP_ROWS` rows; one
group is in memory at a time. Near duplicates are found by blocks: two hashes within d bits agree on at least
m of d + m blocks, so each choice of m blocks is one pass in which only rows with equal keys are compared; m
grows with the number of rows so that keys stay selective.

For 1 billion rows: 33 GB of temporary disk (the hashes, the same hashes split into groups, and a byte per row
for the verdicts) and 0.5 GB of memory, which a full group takes whatever the number of rows (measured with 8
million rows: 0.3 GB exact, 0.47 GB near with d = 3; 12 s and 151 s on a busy core). XXH3's 64 bits give an
expected 0.03 false duplicates.
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
PAIR_ROWS = 1 << 20
"""Maximum number of pairs compared at once."""
ROW = np.dtype([("hash", "<u8"), ("id", "<i8")])
HASH_SIDE = 64
"""Side to which an image is reduced before its perceptual hash; pHash itself reduces it further, to 32."""


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit pHash of an RGB image."""
    bits = imagehash.phash(image).hash.flatten()
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


def exact_duplicates(spool: Spool, group_rows: int = GROUP_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find rows with equal hashes.

    Yields:
        The ids, int64 [N], of rows whose hash equals that of a row with a smaller id; and those of the rows
        with the smallest id of such a hash, int64 [M].
    """
    for group in _groups(spool, lambda rows: rows["hash"], group_rows):
        # Sorted by hash, then id: every row after the first of its hash is a duplicate.
        order = np.lexsort((group["id"], group["hash"]))
        hashes = group["hash"][order]
        ids = group["id"][order]
        equal = hashes[1:] == hashes[:-1]
        is_first = equal & ~np.concatenate([[False], equal[:-1]])[: len(equal)]
        yield ids[1:][equal], ids[:-1][is_first]


def near_duplicates(spool: Spool, distance: int, group_rows: int = GROUP_ROWS) -> Iterator[np.ndarray]:
    """Yield the ids, int64 [N], of rows that are near a row with a smaller id; ids may occur repeatedly.

    Args:
        spool: perceptual hashes.
        distance: maximum Hamming distance of near duplicates, in bits.
        group_rows: rows in memory at a time.
    """
    for blocks in block_choices(spool.rows, distance):
        # Two hashes within the distance agree on all blocks of at least one choice, so no pair is missed.
        mask = bit_mask(blocks)
        for group in _groups(spool, lambda rows, mask=mask: _mixed(rows["hash"] & mask), group_rows):
            keys = group["hash"] & mask
            # Within a key, rows are sorted by id: an earlier row is one with a smaller id.
            order = np.lexsort((group["id"], keys))
            yield _near_in_group(group[order], keys[order], distance)


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


def _near_in_group(rows: np.ndarray, keys: np.ndarray, distance: int) -> np.ndarray:
    """Return the ids of rows that have an earlier row with the same key within `distance` bits.

    A row is compared with the row `lag` places before it, for growing lags; each lag looks only at rows whose
    run of equal keys reaches that far back.

    Args:
        rows: `ROW` [N], sorted by key, then id.
        keys: uint64 [N].
        distance: maximum Hamming distance.
    """
    duplicate = np.zeros(len(rows), bool)

    # Place of each row in its run of equal keys.
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(rows)), bool), keys[1:] != keys[:-1]]))
    first = np.repeat(starts, np.diff(np.append(starts, len(rows))))
    place = np.arange(len(rows)) - first

    candidates = np.flatnonzero(place > 0)
    lag = 1
    while len(candidates):
        # In chunks, because every comparison copies the hashes of both rows.
        for start in range(0, len(candidates), PAIR_ROWS):
            chunk = candidates[start : start + PAIR_ROWS]
            difference = rows["hash"][chunk] ^ rows["hash"][chunk - lag]
            duplicate[chunk[np.bitwise_count(difference) <= distance]] = True
        lag += 1
        # A row that is known to be a duplicate needs no further comparison.
        candidates = candidates[(place[candidates] >= lag) & ~duplicate[candidates]]
    return rows["id"][duplicate]


def _mixed(keys: np.ndarray) -> np.ndarray:
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
        key_of: function from rows [N] to their keys, uint64 [N].
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
            group = (_mixed(key_of(rows)) >> np.uint64(64 - bits)).astype(np.int64)
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
