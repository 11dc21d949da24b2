"""Several datasets as one: which rows of each make an epoch, so that each gives the share of samples that its weight says.

A dataset is an endless sequence of passes over its rows, one bucket's beside the other's. An epoch of the mixture takes the next
stretch of it: one whole pass of the dataset that is largest for its weight, and more of the others, so none has rows that an
epoch does not reach. Where a stretch ends inside a part, the next epoch goes on there. Each pass is an epoch of its own to
its samples: they draw other captions and other noise. One dataset alone gives one pass an epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from pipeline.data.epoch_plan import Integers, Rows, sample_seed


@dataclass(frozen=True)
class Draws:
    """Rows of one bucket, in the order of the batch; each [G]."""

    bucket: str
    sources: Integers
    """Number of each row's dataset."""
    passes: Integers
    """Which pass over its dataset reads the row."""
    parts: Integers
    """Its part, among the dataset's parts of the bucket."""
    rows: Integers

    def at(self, start: int, stop: int) -> "Draws":
        """Rows [start, stop)."""
        columns = (column[start:stop] for column in (self.sources, self.passes, self.parts, self.rows))
        return Draws(self.bucket, *columns)


@dataclass(frozen=True)
class Pieces:
    """The rows of one bucket in one epoch, as pieces of parts; each [P]."""

    sources: Integers
    passes: Integers
    parts: Integers
    firsts: Integers
    """First row of the part that belongs to the epoch."""
    rows: Integers
    """Number of rows from there on."""

    def draws(self, planned: Rows) -> Draws:
        """What the plan, for which a piece is a part, has chosen."""
        at = planned.parts
        rows = self.firsts[at] + planned.rows
        return Draws(planned.bucket, self.sources[at], self.passes[at], self.parts[at], rows)


class Mixture:
    """The epochs of several datasets together."""

    def __init__(self, datasets: Sequence[Mapping[str, Integers]], weights: Sequence[float]) -> None:
        """Weigh the datasets.

        Args:
            datasets: for each, bucket -> rows of each of its parts; none without rows.
            weights: above 0; in proportion to them samples are drawn.
        """
        self.datasets = datasets
        totals = [sum(int(sizes.sum()) for sizes in dataset.values()) for dataset in datasets]
        exact = [Fraction(weight) for weight in weights]
        epoch = max(total / weight for total, weight in zip(totals, exact, strict=True))
        self.passes = [weight * epoch / total for total, weight in zip(totals, exact, strict=True)]
        """Passes over each dataset in an epoch; 1 or more, not always whole."""

    def epoch(self, epoch: int) -> dict[str, Pieces]:
        """Bucket -> what an epoch reads of it."""
        buckets = dict.fromkeys(bucket for dataset in self.datasets for bucket in dataset)
        return {bucket: self._pieces(bucket, epoch) for bucket in buckets}

    def _pieces(self, bucket: str, epoch: int) -> Pieces:
        columns: list[Integers] = []
        for source, dataset in enumerate(self.datasets):
            sizes = dataset.get(bucket, np.zeros(0, np.int64))
            ends = np.cumsum(sizes)
            total = int(sizes.sum())
            start, stop = (floor(total * self.passes[source] * (epoch + after)) for after in (0, 1))
            for turn in range(start // total, (stop - 1) // total + 1) if total else ():
                begins = np.maximum(ends - sizes, start - turn * total)
                rows = np.minimum(ends, stop - turn * total) - begins
                (parts,) = np.nonzero(rows > 0)
                labels = np.full(len(parts), source), np.full(len(parts), turn)
                columns.append(np.stack([*labels, parts, (begins - ends + sizes)[parts], rows[parts]]))
        return Pieces(*np.concatenate(columns, axis=1))


def source_seeds(seed: int, datasets: Sequence[str]) -> tuple[int, ...]:
    """Seed of each dataset's samples: their ids count from 0 in each, and are to be told apart."""
    return (seed,) if len(datasets) == 1 else tuple(sample_seed(seed, 0, 0, f"dataset {name}") for name in datasets)
