"""Comparison of rows with equal keys: the part of the search for near duplicates that is within one pass.

Rows with equal keys form a run. How long runs are cut, and when short ones are, is in `Runs`.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

RUN_ROWS = 16
"""Rows with equal keys above which a run is cut again."""
ROW_COMPARISONS = 5.0
"""Comparisons per row, of all passes, above which shorter runs are cut too. Unrelated hashes take at most
half a comparison per row and pass, because keys have as many values as there are rows."""
INFORMATION_ROWS = 1 << 15
"""Pairs of rows from which a cut learns which bits differ."""
PAIR_ROWS = 1 << 20
"""Maximum number of pairs compared at once."""


def mixed(keys: np.ndarray) -> np.ndarray:
    """Distribute keys over all 64 bits, so that groups split by the top bits have similar sizes."""
    # Fibonacci hashing: multiplication by 2^64 / golden ratio moves differences of all bits to the top bits.
    with np.errstate(over="ignore"):
        mixed = keys * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ (mixed >> np.uint64(29))


class Pairs(NamedTuple):
    """Pairs to compare: each row with some neighboring rows of the same order."""

    places: np.ndarray
    """Rows, int64 [n]."""
    runs: np.ndarray
    """Run of each row, ascending, int64 [n]; only rows of one run are compared."""
    ends: np.ndarray
    """Position behind the last row to compare each row with, int64 [n]."""
    counts: np.ndarray
    """Number of rows to compare each row with, int64 [n]."""


class Cut(NamedTuple):
    """Rows to cut into runs by a key, and to compare within them."""

    places: np.ndarray
    """Rows, int64 [n]."""
    runs: np.ndarray
    """Run of each row, int64 [n]; only rows of one run are compared."""
    key: np.uint64
    """Bits by which the runs are cut first."""
    free: np.uint64
    """Bits on which the rows of a run may still differ after that."""
    budget: float
    """Number of comparisons above which runs of fewer than `RUN_ROWS` rows are cut too."""
    sides: np.ndarray | None = None
    """0 or 1 for each row, int64 [n], if only rows of different sides are compared."""


class Runs:
    """Comparison of all rows with equal keys, which form a run.

    Images that are alike, such as products on white, agree on most bits, so some keys have very many rows.
    The rows of a long run that are not near one of the `RUN_ROWS` rows before them, or of the fewer that the
    budget allows, are cut again, by the bits outside of the key: what holds for all 64 bits holds for these,
    so no pair is missed. A run is cut only if that at least halves the pairs to compare, so cutting never
    compares more than all pairs.
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

    def find(self, cut: Cut, distance: int) -> None:
        """Mark the duplicates among some rows that are at most `distance` bits apart."""
        before = self.comparisons
        order, pairs = self._pairs(cut.places, cut.runs, cut.key, cut.sides)
        sides = None if cut.sides is None else cut.sides[order]
        limit = _limit(self._open(pairs, sides), cut.budget)
        self._compare(pairs._replace(counts=np.minimum(pairs.counts, limit)), distance, sides is None)

        left = pairs.counts > limit
        if sides is None:
            left &= ~self.duplicate[pairs.places]
        is_long = np.bincount(pairs.runs[left], minlength=int(pairs.runs.max(initial=0)) + 1)[pairs.runs] > 0
        if is_long.any():
            sides = None if sides is None else sides[is_long]
            budget = max(0.0, cut.budget - (self.comparisons - before))
            rest = cut._replace(places=pairs.places[is_long], runs=pairs.runs[is_long], sides=sides)
            self._cut(rest._replace(budget=budget), limit, distance)

    def _pairs(
        self, places: np.ndarray, runs: np.ndarray, key: np.uint64, sides: np.ndarray | None
    ) -> tuple[np.ndarray, Pairs]:
        """Cut runs by a key.

        Args:
            places: rows, int64 [n], ascending within each run; with sides, within each side of a run, if not
                in all of it.
            runs: run of each row, int64 [n].
            key: bits by which the runs are cut.
            sides: 0 or 1 for each row, int64 [n], if only rows of different sides are compared.

        Returns:
            The order of the rows by new run, side and id, int64 [n]; and in this order the pairs to compare:
            each row with all before it, or with all of the smaller side.
        """
        # Sorting numbers is ten times as fast as sorting rows by several columns. The hash of run and key is
        # cut off to make room for side and position, so two runs may become one: then a few pairs are
        # compared that need not be.
        room = np.uint64(1 + max(1, len(places)).bit_length())
        codes = mixed((self.rows["hash"][places] & key) ^ mixed(runs.astype(np.uint64) + np.uint64(1)))
        codes = codes >> room << room | np.arange(len(places), dtype=np.uint64)
        if sides is not None:
            codes |= sides.astype(np.uint64) << (room - np.uint64(1))
        codes.sort()
        order = (codes & ((np.uint64(1) << (room - np.uint64(1))) - np.uint64(1))).astype(np.int64)
        codes >>= room
        is_new = np.ones(len(places), bool)
        is_new[1:] = codes[1:] != codes[:-1]
        starts = np.flatnonzero(is_new)
        number = np.cumsum(is_new) - 1
        positions = np.arange(len(places))
        if sides is None:
            return order, Pairs(places[order], number, positions, positions - starts[number])

        sides = sides[order]
        ones = np.bincount(number, sides, len(starts)).astype(np.int64)
        rows = np.diff(np.append(starts, len(places)))
        smaller = (2 * ones < rows).astype(np.int64)
        ends = (starts + np.where(smaller == 1, rows, rows - ones))[number]
        counts = np.where(sides == smaller[number], 0, np.minimum(ones, rows - ones)[number])
        return order, Pairs(places[order], number, ends, counts)

    def _compare(self, pairs: Pairs, distance: int, is_later: bool) -> None:
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

    def _cut(self, cut: Cut, limit: int, distance: int) -> None:
        """Mark the duplicates among the rows of runs that are longer than `limit`."""
        order, pairs = self._pairs(cut.places, cut.runs, np.uint64(0), cut.sides)
        places, runs = pairs.places, pairs.runs
        sides = None if cut.sides is None else cut.sides[order]
        bits = self.information(places, runs, cut.free)
        choices = _choose_bits(bits, distance, (int(pairs.counts.max()) + 1) / max(1, limit))
        counts = np.zeros((1 + len(choices), int(runs[-1]) + 1))
        counts[0] = np.bincount(runs, self._open(pairs, sides))
        for number, blocks in enumerate(choices, 1):
            order, less = self._pairs(places, runs, blocks, sides)
            counts[number] = np.bincount(runs[order], self._open(less, sides))

        is_cut = ((2 * counts[1:].sum(0) <= counts[0]) & bool(choices))[runs]
        self._compare(pairs._replace(counts=np.where(is_cut, 0, pairs.counts)), distance, sides is None)
        if is_cut.any():
            sides = None if sides is None else sides[is_cut]
            budget = cut.budget / len(choices)
            for blocks in choices:
                rest = Cut(places[is_cut], runs[is_cut], blocks, cut.free & ~blocks, budget, sides)
                self.find(rest, distance)

    def information(self, places: np.ndarray, runs: np.ndarray, free: np.uint64) -> dict[int, float]:
        """Return how many bits of a key each bit of `free` is worth, between 0 and 1.

        It is the entropy of the difference of neighboring rows of a run: 1 where half of them differ.

        Args:
            places: rows, int64 [n].
            runs: run of each row, int64 [n], ascending.
            free: the bits.
        """
        first = np.flatnonzero(runs[1:] == runs[:-1])
        first = first[:: max(1, len(first) // INFORMATION_ROWS)]
        hashes = self.rows["hash"]
        difference = hashes[places[first]] ^ hashes[places[first + 1]]
        worth: dict[int, float] = {}
        for bit in range(64):
            if int(free) >> bit & 1:
                ones = int((difference >> np.uint64(bit) & np.uint64(1)).sum())
                share = min(0.5, ones / max(1, len(first)))
                worth[bit] = -share * math.log2(share) - (1 - share) * math.log2(1 - share) if share else 0.0
        return worth

    def _open(self, pairs: Pairs, sides: np.ndarray | None) -> np.ndarray:
        """Return the number of rows to compare each row with, int64 [n]: none where it is known to be a
        duplicate and the later row of its pairs."""
        return pairs.counts if sides is not None else pairs.counts * ~self.duplicate[pairs.places]


def _limit(counts: np.ndarray, budget: float) -> int:
    """Return the number of rows to compare each row with, at most `RUN_ROWS`, that a budget allows.

    Args:
        counts: number of rows to compare each row with, int64 [n].
        budget: number of comparisons.
    """
    # Rows with more than 0, 1, 2, ... others: each of them adds a comparison to a limit above that.
    rows = np.bincount(np.minimum(counts, RUN_ROWS), minlength=RUN_ROWS + 1)
    more = np.cumsum(rows[::-1])[::-1][1:]
    return int((np.cumsum(more) <= budget).sum())


def _choose_bits(bits: dict[int, float], distance: int, parts: float) -> list[np.uint64]:
    """Return masks of some bits, of which two hashes within `distance` agree on at least one.

    The bits are divided into blocks that say equally much about the rows: blocks of neighboring bits, on
    which images that are alike agree, would leave runs as long as they are.

    Args:
        bits: each bit, and how much it says (`Runs.information`); there is no such mask if they are not more
            than `distance`.
        distance: maximum Hamming distance.
        parts: number of parts into which the longest run is to be cut.
    """
    if len(bits) <= distance:
        return []
    wanted, total = math.log2(max(1.0, parts)), sum(bits.values())
    matching = 1
    # More blocks make longer keys, but also more passes.
    while matching < 3 and distance + matching < len(bits):
        if total * matching / (distance + matching) >= wanted:
            break
        matching += 1

    blocks = [0] * (distance + matching)
    sums = [0.0] * len(blocks)
    for bit in sorted(bits, key=lambda bit: -bits[bit]):
        place = min(range(len(blocks)), key=lambda place: (sums[place], blocks[place].bit_count()))
        sums[place] += bits[bit]
        blocks[place] |= 1 << bit
    return [np.uint64(sum(choice)) for choice in itertools.combinations(blocks, matching)]
