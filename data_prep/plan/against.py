"""Evaluation sets (`dedupe.against`): the hashes of their images, and the pairs that have one of them.

An image that a model is scored on must not be trained on. The files of the sets are listed and hashed like
source files: by the same tasks, in the same worker processes, with one committed table per file. Tasks
that finish the plan load their hashes, 9 bytes per image and kind of hash (12 MB for the 1.3 million images
of ImageNet), and compare all rows with them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute

from data_prep.config import DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.schema import EvaluationCounts
from data_prep.plan.dedupe import Spool, bit_mask, block_choices
from data_prep.plan.listing import FOLDER, freeze_files, removed, source_counts
from data_prep.plan.scan import EVALUATION
from data_prep.plan.scan_tables import exact_hashes, read_scan
from data_prep.sources.sample import printable
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store
from model.common.errors import UserError

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

AGAINST_FOLDER = f"{FOLDER}/against"
MAX_IMAGES = 1 << 25
"""Images of all sets together. More would take much memory, and are no evaluation sets."""
MAX_NAME = 200
NO_SET = 255
"""Number of the set of a row that is in none."""


def evaluation_key(number: int) -> str:
    """Key of the table of hashes of file `number` of the evaluation sets."""
    return f"{AGAINST_FOLDER}/{number:08d}.parquet"


def as_sources(config: DatasetConfig) -> DatasetConfig:
    """Return the settings of a dataset whose sources are the evaluation sets of another one."""
    sets = config.dedupe.against or []
    kinds = sorted({kind for source in sets for kind in source.captions})
    return replace(config, sources=sets, caption_kinds=kinds, dedupe=DedupeConfig())


def set_name(source: SourceConfig) -> str:
    """Name of an evaluation set in reasons and counts."""
    return printable(source.path or source.kind)[:MAX_NAME]


def freeze_evaluation_files(config: DatasetConfig, dataset: Store) -> list[SourceFile]:
    """List the files of the evaluation sets once for all tasks; none without the key `dedupe.against`.

    Raises:
        UserError: if a set has no files.
    """
    if config.dedupe.against is None:
        return []
    try:
        return freeze_files(as_sources(config), dataset, AGAINST_FOLDER)
    except UserError as error:
        raise UserError(f"dedupe.against: {error}") from error


class EvaluationSets:
    """The hashes of all evaluation sets, in memory."""

    def __init__(self, config: DatasetConfig, dataset: Store, files: list[SourceFile]) -> None:
        """Load the hashes.

        Args:
            config: the dataset's settings.
            dataset: the dataset's store.
            files: the files of the sets, which are scanned.

        Raises:
            UserError: if there are more than `MAX_IMAGES` images.
        """
        near = config.dedupe.near is not None
        self._counts = _no_counts(config, dataset)
        kinds = ["hash", "phash"] if near else ["hash"]
        hashes: dict[str, list[np.ndarray]] = {kind: [np.empty(0, np.uint64)] for kind in kinds}
        sets: dict[str, list[np.ndarray]] = {kind: [np.empty(0, np.uint8)] for kind in kinds}

        for file in files:
            count = self._counts[file.source]
            for table in read_scan(dataset, evaluation_key(file.number), EVALUATION):
                for kind in kinds:
                    known = exact_hashes(table.filter(pc.is_valid(table[kind]))[kind])
                    hashes[kind].append(known)
                    sets[kind].append(np.full(len(known), file.source, np.uint8))
                count["images"] += len(table)
                count["unreadable"] += table[kinds[-1]].null_count
            if sum(entry["images"] for entry in self._counts) > MAX_IMAGES:
                raise UserError(
                    f"dedupe.against: more than {MAX_IMAGES:,} images, and their hashes are all in memory: "
                    "name only the sets that you evaluate on"
                )

        self._exact = _first_of_each(np.concatenate(hashes["hash"]), np.concatenate(sets["hash"]))
        self._near = _first_of_each(
            np.concatenate(hashes.get("phash", hashes["hash"][:1])),
            np.concatenate(sets.get("phash", sets["hash"][:1])),
        )

    def counts(self) -> list[EvaluationCounts]:
        """Return the counts of each set, in the order of the dataset's YAML."""
        return self._counts

    def with_equal_hash(self, hashes: np.ndarray) -> np.ndarray:
        """Return the first set with an image of the same hash, or `NO_SET`.

        Args:
            hashes: uint64 [N].

        Returns:
            uint8 [N].
        """
        known, sets = self._exact
        found = np.full(len(hashes), NO_SET, np.uint8)
        if len(known):
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            equal = known[place] == hashes
            found[equal] = sets[place[equal]]
        return found

    def near(
        self, spool: Spool, distance: int, chunk_rows: int = 1 << 20
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows that look like an image of a set; a row may occur repeatedly, with different sets.

        Like `near_duplicates`, but a row is compared with the few images of the sets only: the rows are read
        once per choice of blocks, and keys of log2(images) bits are enough.

        Args:
            spool: perceptual hashes of the rows.
            distance: maximum Hamming distance, in bits.
            chunk_rows: rows in memory at a time.

        Yields:
            The ids of some rows, int64 [N], and for each the number of a set, uint8 [N].
        """
        known, sets = self._near
        for blocks in block_choices(len(known), distance) if len(known) else []:
            mask = bit_mask(blocks)
            # Within a key, images are sorted by set, so the first one that is near has the first set.
            order = np.lexsort((sets, known & mask))
            keys = known[order] & mask
            for rows in spool.read(chunk_rows):
                wanted = rows["hash"] & mask
                place = np.searchsorted(keys, wanted, "left")
                end = np.searchsorted(keys, wanted, "right")
                # One image of each row's key at a time, and only of the rows that still have another one.
                left = np.flatnonzero(place < end)
                while len(left):
                    image = order[place[left]]
                    close = np.bitwise_count(rows["hash"][left] ^ known[image]) <= distance
                    yield rows["id"][left[close]], sets[image[close]]
                    left = left[~close]
                    place[left] += 1
                    left = left[place[left] < end[left]]


def _first_of_each(hashes: np.ndarray, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different hashes, sorted, and the first set of each."""
    order = np.lexsort((sets, hashes))
    values, first = np.unique(hashes[order], return_index=True)
    return values, sets[order][first]


def _no_counts(config: DatasetConfig, dataset: Store) -> list[EvaluationCounts]:
    """Return the counts of each set before its images are counted."""
    sets, listed = config.dedupe.against or [], source_counts(dataset, AGAINST_FOLDER)
    if len(sets) != len(listed):
        raise removed(dataset, f"{AGAINST_FOLDER}/sources.json")
    return [
        EvaluationCounts(
            name=set_name(source),
            images=0,
            unreadable=0,
            files=counts["files"],
            ignored=counts["ignored"],
        )
        for source, counts in zip(sets, listed, strict=True)
    ]
