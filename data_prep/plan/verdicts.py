"""Verdicts on all scanned rows, one byte each: kept, or dropped and why.

A row that a filter dropped is not judged again, nor does it make another one a duplicate. The others are
judged in this order: in an evaluation set, exact duplicate, looks like an image of an evaluation set, near
duplicate, listed in `dedupe.drop`. So the duplicates are those of a dataset that never had the images of the
evaluation sets. The list comes last, because the other program saw what an earlier plan had kept: which of
two equal rows stays must not depend on it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from data_prep.config import MAX_EVALUATION_SETS, DatasetConfig
from data_prep.dataset.schema import DropListCounts
from data_prep.plan.against import NO_SET, EvaluationSets, set_name
from data_prep.plan.copies import Copies
from data_prep.plan.dedupe import EXACT, NEAR, Spool, exact_duplicates, near_duplicates
from data_prep.plan.drop_list import find_rows, frozen_ids
from data_prep.plan.scan_tables import exact_hashes, read_scan, scan_key
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store
from model.common.files import naming_full_disk

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

LISTED_REASON = "dedupe: listed in dedupe.drop"

KEPT, COPIED, SAME_FILE, LOOKS_SAME, FILTERED, LISTED = range(6)
"""Verdicts on a row: kept, kept and with exact duplicates, or dropped."""
IN_SET = 16
"""Verdict on a row whose file is in evaluation set 0; those of the other sets follow."""
LIKE_SET = IN_SET + MAX_EVALUATION_SETS
"""Verdict on a row that looks like an image of evaluation set 0; those of the other sets follow."""


class Verdicts(NamedTuple):
    """The result of judging all rows."""

    starts: np.ndarray
    """The number of the first row of each file, and of all rows, int64 [files + 1]."""
    verdicts: np.ndarray
    """uint8 [rows], a memory map."""
    drop: DropListCounts | None
    """Counts of `dedupe.drop`; None without that key."""

    def of(self, file: int) -> np.ndarray:
        """Return the verdicts on the rows of a source file, which can be changed in place."""
        return self.verdicts[self.starts[file] : self.starts[file + 1]]


def judge_rows(
    config: DatasetConfig,
    dataset: Store,
    files: list[SourceFile],
    folder: Path,
    evaluation: EvaluationSets | None,
) -> Verdicts:
    """Judge all rows.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        files: all source files, which are scanned.
        folder: temporary folder for hashes and verdicts.
        evaluation: the evaluation sets; None = none.

    Raises:
        UserError: if the disk is full, or the drop list cannot be read any more.
    """
    spool = Spool(folder, "hashes")
    path = folder / "verdicts"
    starts = _collect_hashes(dataset, files, spool, path, evaluation)
    # NumPy cannot map an empty file.
    verdicts = np.memmap(path, np.uint8, "r+") if starts[-1] else np.empty(0, np.uint8)

    if config.dedupe.exact:
        for ids, firsts in exact_duplicates(spool):
            verdicts[_positions(ids, starts)] = SAME_FILE
            verdicts[_positions(firsts, starts)] = COPIED
    spool.close()

    # After the exact duplicates, so that of equal files only one is compared.
    if config.dedupe.near is not None:
        if evaluation is not None:
            spool = _collect_perceptual_hashes(dataset, files, folder, starts, verdicts)
            for ids, sets in evaluation.near(spool, config.dedupe.near):
                _mark_first_set(verdicts, _positions(ids, starts), sets)
            spool.close()

        spool = _collect_perceptual_hashes(dataset, files, folder, starts, verdicts)
        for ids in near_duplicates(spool, config.dedupe.near):
            verdicts[_positions(ids, starts)] = LOOKS_SAME
        spool.close()

    drop = None
    if config.dedupe.drop is not None:
        drop = _drop_listed(frozen_ids(config.dedupe.drop, dataset), starts, verdicts)
    return Verdicts(starts, verdicts, drop)


def _collect_hashes(
    dataset: Store,
    files: list[SourceFile],
    spool: Spool,
    verdicts: Path,
    evaluation: EvaluationSets | None,
) -> np.ndarray:
    """Spool the hashes of all rows that passed the filters and are in no evaluation set, and write the first
    verdicts to a file.

    Returns:
        The number of the first row of each file, int64 [files + 1].
    """
    starts = [0]
    with verdicts.open("wb") as out:
        for file in files:
            rows = 0
            for table in read_scan(dataset, scan_key(file.number), columns=["id", "reason", "hash"]):
                hashes = exact_hashes(table["hash"])
                judged = np.where(pc.equal(table["reason"], "").to_numpy(), KEPT, FILTERED).astype(np.uint8)
                if evaluation is not None:
                    sets = evaluation.with_equal_hash(hashes)
                    found = (judged == KEPT) & (sets != NO_SET)
                    judged[found] = IN_SET + sets[found]

                passed = judged == KEPT
                spool.add(hashes[passed], table["id"].to_numpy()[passed])
                with naming_full_disk(verdicts):
                    out.write(judged.tobytes())
                rows += len(table)
            starts.append(starts[-1] + rows)
    return np.array(starts, np.int64)


def _collect_perceptual_hashes(
    dataset: Store, files: list[SourceFile], folder: Path, starts: np.ndarray, verdicts: np.ndarray
) -> Spool:
    """Spool the perceptual hashes of all rows that are still kept."""
    spool = Spool(folder, "phashes")
    for file in files:
        row = int(starts[file.number])
        for table in read_scan(dataset, scan_key(file.number), columns=["id", "phash"]):
            kept = verdicts[row : row + len(table)] <= COPIED
            spool.add(exact_hashes(table["phash"])[kept], table["id"].to_numpy()[kept])
            row += len(table)
    return spool


def _mark_first_set(verdicts: np.ndarray, rows: np.ndarray, sets: np.ndarray) -> None:
    """Mark rows that look like an image of a set; of several sets, the first one counts."""
    marks = (LIKE_SET + sets.astype(np.int64)).astype(np.uint8)
    # A row may occur with several sets, in one call or in several.
    found = np.where(verdicts[rows] <= COPIED, np.uint8(255), verdicts[rows])
    verdicts[rows] = found
    np.minimum.at(verdicts, rows, marks)


def _drop_listed(batches: Iterator[np.ndarray], starts: np.ndarray, verdicts: np.ndarray) -> DropListCounts:
    """Drop the rows of the drop list that are still kept, and count its ids."""
    counts = DropListCounts(ids=0, unmatched=0)
    for ids in batches:
        rows = find_rows(ids, starts)
        counts["ids"] += len(ids)
        counts["unmatched"] += int((rows < 0).sum())
        rows = rows[rows >= 0]
        verdicts[rows[verdicts[rows] <= COPIED]] = LISTED
    return counts


def _positions(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the row numbers, over all files, of sample ids (see `sources.source`)."""
    return starts[ids >> 32] + (ids & 0xFFFFFFFF)


def reasons_of(config: DatasetConfig) -> dict[int, str]:
    """Return the reason of each verdict that drops a row, except a filter's."""
    reasons = {SAME_FILE: EXACT, LOOKS_SAME: NEAR, LISTED: LISTED_REASON}
    for number, source in enumerate(config.dedupe.against or []):
        reasons[IN_SET + number] = f"{EXACT} as in {set_name(source)}"
        reasons[LIKE_SET + number] = f"{NEAR} as in {set_name(source)}"
    return reasons


def collect_copies(dataset: Store, files: list[SourceFile], judged: Verdicts, path: Path) -> Copies:
    """Store the captions of all exact duplicates.

    Raises:
        UserError: if the disk is full.
    """
    copies = Copies(path)
    for file in files:
        verdicts = judged.of(file.number)
        if SAME_FILE not in verdicts:
            continue

        row = 0
        for table in read_scan(dataset, scan_key(file.number), columns=["id", "hash", "captions"]):
            copies.add(table.take(np.flatnonzero(verdicts[row : row + len(table)] == SAME_FILE)))
            row += len(table)
    copies.complete()
    return copies


def judged_tables(
    dataset: Store, number: int, verdicts: np.ndarray, reasons: dict[int, str], copies: Copies | None
) -> Iterator[pa.Table]:
    """Yield a source file's scan table with the reasons of the verdicts filled in, and the captions of exact
    duplicates handed to the rows that stay.

    Args:
        dataset: the dataset's store.
        number: the file.
        verdicts: the verdicts on its rows, uint8 [rows].
        reasons: reason of each verdict.
        copies: captions of the exact duplicates; None = none is handed over.
    """
    row = 0
    for table in read_scan(dataset, scan_key(number)):
        verdict = verdicts[row : row + len(table)]
        row += len(table)

        texts = np.array(table["reason"].to_pylist(), object)
        for code in np.unique(verdict).tolist():
            if code in reasons:
                texts[verdict == code] = reasons[code]
        column = table.schema.get_field_index("reason")
        table = table.set_column(column, "reason", pa.array(texts.tolist(), pa.string()))

        copied = np.flatnonzero(verdict == COPIED).tolist()
        yield copies.hand_over(table, copied) if copies and copied else table
