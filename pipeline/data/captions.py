"""The choice of a sample's caption, and the captions themselves where the trainer encodes them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.dataset.snapshot_reader import read_captions
from model.common.errors import UserError
from pipeline.data.part_files import DatasetFiles

Caption = tuple[int, str]
"""Kind, an index into the dataset's kinds of captions; and text."""

_MAX_PARTS = 256
"""Parts of which a loader process keeps the captions."""


@dataclass
class CaptionChoice:
    """The rule by which a sample's caption is picked."""

    kinds: list[str]
    """The dataset's kinds of captions; shards contain indices into this list."""
    weights: dict[str, float]
    """Kind -> weight; empty = all captions alike. Kinds without a weight are not picked."""
    drop: float
    """Share of samples that get the null caption."""

    def __post_init__(self) -> None:
        weights = self.weights.values()
        if any(weight < 0 for weight in weights) or (weights and not any(weights)):
            raise UserError(
                "data.caption_weights: give weights that are not negative, and at least one above 0"
            )

    def pick(self, rng: np.random.Generator, kinds: NDArray[np.uint8], may_drop: bool) -> int | None:
        """Return the index of a sample's caption among its captions; None = the null caption.

        Args:
            rng: the sample's random numbers.
            kinds: kind of each of its captions.
            may_drop: replace the caption by the null caption for a share `drop` of the samples.
        """
        # Both numbers are taken in any case, so the picked caption does not depend on `drop` or `may_drop`.
        drop_at, pick_at = rng.random(2)
        if not len(kinds) or (may_drop and drop_at < self.drop):
            return None

        shares = np.ones(len(kinds))
        if self.weights:
            # A kind's weight is shared by the sample's captions of that kind.
            counts = np.bincount(kinds, minlength=len(self.kinds))
            shares = np.array([self.weights.get(self.kinds[kind], 0.0) / counts[kind] for kind in kinds])
            if not shares.any():
                # A sample that has no weighted kind must still have a caption: all of its captions count
                # alike.
                shares = np.ones(len(kinds))
        # `limits[-1]` and not 1: the shares do not have to sum to 1, so the number is scaled instead.
        limits = np.cumsum(shares)
        return int(np.searchsorted(limits, pick_at * limits[-1], side="right"))


class WrittenCaptions:
    """The captions of the pairs themselves, part by part."""

    def __init__(self, sources: Sequence[DatasetFiles]) -> None:
        self._sources = sources
        self._parts: OrderedDict[tuple[int, str, int], dict[int, list[Caption]]] = OrderedDict()

    def read(self, bucket: str, places: Sequence[tuple[int, int]], ids: Sequence[int]) -> list[list[Caption]]:
        """Return all captions of each sample.

        Args:
            bucket: the samples' bucket.
            places: number of the dataset and of the part of each sample.
            ids: its id.

        Raises:
            StoreError: if the pairs of a part are missing or damaged.
        """
        # A part's captions are read whole: its samples are shuffled together, so the others will be asked for
        # soon.
        for source, part in set(places):
            key = source, bucket, part
            if key not in self._parts:
                files = self._sources[source]
                self._parts[key] = read_captions(files.cache.dataset, *files.index.part(bucket, part))
            self._parts.move_to_end(key)

        captions = [
            self._parts[source, bucket, part][id] for (source, part), id in zip(places, ids, strict=True)
        ]
        # Only after the batch was served, because one batch may need more parts than the limit.
        while len(self._parts) > _MAX_PARTS:
            self._parts.popitem(last=False)
        return captions
