"""Several datasets as one: the rows of each that make an epoch, so that shares of samples follow the weights.

Each dataset is repeated endlessly, pass after pass, separately for each bucket. An epoch of the mixture takes
the next stretch of it: one whole pass of the dataset that is largest for its weight, and more of the others,
so every row of every dataset is reached in each epoch. Where a stretch ends inside a part, the next epoch
continues there. To its samples each pass is an epoch of its own, with other captions and other noise. If
there is only one dataset, an epoch is one pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from pipeline.data.epoch_plan import Integers, PlannedRows, sample_seed


@dataclass(frozen=True)
class EpochRows:
    """Rows of one bucket, in the order of the batch; each array is [G]."""

    bucket: str
    sources: Integers
    """Number of each row's dataset."""
    passes: Integers
    """Number of the pass over that dataset which reads the row."""
    parts: Integers
    """The row's part, among the dataset's parts of the bucket."""
    indices: Integers
    """The row's number in its part."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """Dataset and part of each row."""
        return list(zip(self.sources.tolist(), self.parts.tolist(), strict=True))

    def slice(self, start: int, stop: int) -> "EpochRows":
        """Return rows [start, stop)."""
        columns = (column[start:stop] for column in (self.sources, self.passes, self.parts, self.indices))
        return EpochRows(self.bucket, *columns)


@dataclass(frozen=True)
class Pieces:
    """The rows of one bucket in one epoch, as pieces of parts; each array is [P]."""

    sources: Integers
    passes: Integers
    parts: Integers
    firsts: Integers
    """First row of the part that belongs to the epoch."""
    rows: Integers
    """Number of rows from there on."""

    def pick(self, planned: PlannedRows) -> EpochRows:
        """Return the rows that a plan has chosen, in which a piece counts as a part."""
        pieces = planned.parts
        indices = self.firsts[pieces] + planned.rows
        return EpochRows(
            planned.bucket, self.sources[pieces], self.passes[pieces], self.parts[pieces], indices
        )


class Mixture:
    """The epochs of several datasets together."""

    def __init__(self, datasets: Sequence[Mapping[str, Integers]], weights: Sequence[float]) -> None:
        """Weigh the datasets.

        Args:
            datasets: per dataset, bucket -> rows of each of its parts; no dataset is empty.
            weights: per dataset, above 0; its share of the samples is proportional to it.
        """
        self.datasets = datasets
        totals = []
        for dataset in datasets:
            totals.append(sum(int(sizes.sum()) for sizes in dataset.values()))
        # Fractions, since rounding would add up over epochs: a row at the border of two would come twice or
        # never.
        exact = [Fraction(weight) for weight in weights]
        # The dataset with the most samples per unit of weight sets the length: one pass over it is an epoch.
        epoch = max(total / weight for total, weight in zip(totals, exact, strict=True))
        self.passes = [weight * epoch / total for total, weight in zip(totals, exact, strict=True)]
        """Passes over each dataset per epoch; 1 or more, not always whole."""

    def epoch(self, epoch: int) -> dict[str, Pieces]:
        """Bucket -> its rows in an epoch."""
        buckets = dict.fromkeys(bucket for dataset in self.datasets for bucket in dataset)
        return {bucket: self._pieces(bucket, epoch) for bucket in buckets}

    def _pieces(self, bucket: str, epoch: int) -> Pieces:
        columns: list[Integers] = []
        for source, dataset in enumerate(self.datasets):
            sizes = dataset.get(bucket, np.zeros(0, np.int64))
            total = int(sizes.sum())
            if not total:
                continue
            part_ends = np.cumsum(sizes)
            part_starts = part_ends - sizes

            # Rows of the endless sequence of passes that this epoch takes.
            start, stop = (floor(total * self.passes[source] * number) for number in (epoch, epoch + 1))
            for number in range(start // total, (stop - 1) // total + 1):
                # The stretch, cut to this pass and to each part; parts outside of it get no rows, or fewer
                # than none.
                begins = np.maximum(part_starts, start - number * total)
                rows = np.minimum(part_ends, stop - number * total) - begins
                (parts,) = np.nonzero(rows > 0)
                labels = np.full(len(parts), source), np.full(len(parts), number)
                columns.append(np.stack([*labels, parts, (begins - part_starts)[parts], rows[parts]]))
        # The rows of the stacked table are the fields of `Pieces`, in their order.
        return Pieces(*np.concatenate(columns, axis=1))


def source_seeds(seed: int, datasets: Sequence[str]) -> tuple[int, ...]:
    """Return one seed per dataset for the random numbers of its samples.

    Ids of samples count from 0 in each dataset, so they do not distinguish samples of several datasets.
    """
    if len(datasets) == 1:
        return (seed,)
    return tuple(sample_seed(seed, 0, 0, f"dataset {name}") for name in datasets)
