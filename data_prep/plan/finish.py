"""The finish of a plan: from the tables of all scanned files to the manifest, shared by all tasks.

Its steps are in `duplicates`, `rows` and `windows`. Each has units of which a task does those that are
missing (`units`), so no task waits for another one, and after a kill at most one unit is repeated. Source
files are taken in groups of about the same number of bytes.

For 1 billion rows in 100,000 files: 700 groups, each half a minute of one core; 0.2 TB of the units' objects,
which are removed when the plan exists. A task takes less than 2 GB of memory, and with `dedupe.near` 8 GB of
disk below TMPDIR.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, PLAN_KEY, read_plan
from data_prep.dataset.records import read_object
from data_prep.dataset.schema import Manifest
from data_prep.plan.against import EvaluationSets
from data_prep.plan.annotations import FILTERS_KEY, annotated_scan, check_filters
from data_prep.plan.counts import check_counts, merge_counts
from data_prep.plan.duplicates import Duplicates
from data_prep.plan.listing import FOLDER, removed, source_counts
from data_prep.plan.pieces import remove_pieces
from data_prep.plan.rows import DROPPED_FOLDER, JudgedRows
from data_prep.plan.scan_tables import scan_key
from data_prep.plan.scanned import ANNOTATED, Scanned
from data_prep.plan.units import FINISH, SupersededError
from data_prep.plan.windows import Windows
from data_prep.sources.source import SourceFile
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.records import STRICT, Count, parse_record, seal
from model.common.share import Share

SETTINGS_KEY = "dataset.json"
GROUPS_KEY = f"{FINISH}/groups.json"
MIN_GROUP_BYTES = 64 << 20
MAX_GROUP_BYTES = 256 << 20
"""Compressed bytes of the scan tables of a group: 1 to 3 million rows. Smaller groups are more requests, of
which there are two per pair of groups; larger ones take more memory, and more time after a kill."""
WANTED_GROUPS = 512
RANGE_BYTES = 512 << 20
"""Compressed bytes of the scan tables per range of hashes: at most 13 million rows."""
MAX_RANGES = 256


class GroupList(TypedDict):
    """`scan/finish/groups.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    groups: list[list[Count]]
    """Numbers of the source files of each group, in the plan's order."""
    ranges: Count
    """Number of ranges of the hash."""


def file_order(config: DatasetConfig, files: Sequence[SourceFile]) -> list[int]:
    """Return the numbers of the source files in the shuffled order in which the plan takes them."""
    # The 0 separates this random stream from those of the windows.
    return np.random.default_rng([config.seed, 0]).permutation(len(files)).tolist()


def finish_plan(
    config: DatasetConfig,
    dataset: Store,
    files: Sequence[SourceFile],
    evaluation: Sequence[SourceFile],
    share: Share,
) -> Manifest:
    """Judge all scanned rows, and write the dropped tables, the manifest and the counts.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        files: all source files, which are scanned.
        evaluation: the files of the evaluation sets, which are scanned.
        share: the units that this task does first.

    Returns:
        The plan.

    Raises:
        UserError: if no pair is left, the disk is full, the drop list cannot be read any more, or another
            task has removed the scan.
    """
    try:
        manifest = _finish(config, dataset, files, evaluation, share)
    except (SupersededError, FileNotFoundError, UserError) as error:
        if isinstance(error, UserError) or not dataset.exists(Manifest.KEY):
            # If no pairs were left, this task may have written more since another one removed everything.
            if not dataset.exists(SETTINGS_KEY):
                remove_scan(dataset)
            if isinstance(error, UserError):
                raise
            raise removed(dataset, FINISH) from error
        manifest = read_plan(dataset)
    remove_units(dataset)
    remove_pieces(config, dataset)
    return manifest


def _finish(
    config: DatasetConfig,
    dataset: Store,
    files: Sequence[SourceFile],
    evaluation: Sequence[SourceFile],
    share: Share,
) -> Manifest:
    sets = EvaluationSets(config, dataset, list(evaluation)) if evaluation else None
    record = _freeze_groups(config, dataset, files)
    scanned = Scanned(config, dataset, share, files, record["groups"], record["ranges"], sets)
    if config.annotations:
        check_filters(config, dataset, freeze=True)
        scanned.make(ANNOTATED, len(files), partial(annotated_scan, config, dataset))
    duplicates = Duplicates(scanned)
    duplicates.find()
    rows = JudgedRows(scanned, duplicates)
    rows.make()
    counts = merge_counts(rows.counts)
    if not any(file["kept"] for file in counts["files"]):
        _nothing_left(dataset, counts["files"])

    windows = Windows(scanned, rows)
    windows.make()
    # A plan with wrong counts must not come to exist.
    check_counts(counts["files"], sum(sum(parts) for parts in windows.parts.values()))
    plan: dict[str, Any] = {**counts, "sources": source_counts(dataset), "manifest": windows.hashes()}
    if sets is not None:
        plan["against"] = sets.counts()
    drop = duplicates.drop_counts()
    if drop is not None:
        plan["drop"] = drop
    dataset.put_new(PLAN_KEY, seal(plan))

    # Last, because the manifest makes the plan exist.
    manifest = Manifest(config.name, list(config.caption_kinds), dict(sorted(windows.parts.items())))
    dataset.put_new(Manifest.KEY, manifest.to_json())
    return manifest


def _freeze_groups(config: DatasetConfig, dataset: Store, files: Sequence[SourceFile]) -> GroupList:
    """Divide the files into groups once for all tasks."""
    if not dataset.exists(GROUPS_KEY):
        sizes = {entry.key: entry.bytes for entry in dataset.listing(f"{FOLDER}/")}
        total = sum(sizes.get(scan_key(file.number), 0) for file in files)
        wanted = min(MAX_GROUP_BYTES, max(MIN_GROUP_BYTES, total // WANTED_GROUPS))

        groups: list[list[int]] = [[]]
        bytes = 0
        for number in file_order(config, files):
            size = sizes.get(scan_key(number), 0)
            if groups[-1] and bytes + size > wanted:
                groups.append([])
                bytes = 0
            groups[-1].append(number)
            bytes += size
        ranges = min(MAX_RANGES, -(-max(1, total) // RANGE_BYTES))
        dataset.put_new(GROUPS_KEY, seal({"groups": groups, "ranges": ranges}))
    return read_object(dataset, GROUPS_KEY, lambda data: parse_record(GroupList, data), PLAN_AGAIN)


def remove_units(dataset: Store) -> None:
    """Remove the objects of the units, which a plan that exists does not need."""
    dataset.delete_many(dataset.list(f"{FINISH}/"))


def remove_scan(dataset: Store) -> None:
    """Remove the lists of files, all scan tables, and what was made of them before the plan exists."""
    dataset.delete_many([*dataset.list(f"{FOLDER}/"), *dataset.list(f"{DROPPED_FOLDER}/")])


def _nothing_left(dataset: Store, files: Sequence[dict[str, Any]]) -> None:
    """Remove what was written, so that other settings can be tried, and say why nothing is left.

    Raises:
        UserError: always.
    """
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file["dropped"])

    # The settings after the scan, so that an interruption here still refuses other settings.
    remove_scan(dataset)
    dataset.delete(FILTERS_KEY)
    dataset.delete(SETTINGS_KEY)
    # Another task may have written more meanwhile. From here on it finds no settings and removes that itself.
    remove_scan(dataset)

    rows = sum(file["rows"] for file in files)
    top = ", ".join(f"{reason} ({count:,})" for reason, count in counts.most_common(4))
    raise UserError(
        f"no pairs left of {rows:,} rows read: {top or 'the sources are empty'}: "
        "correct `sources`, `filters` or `buckets`"
    )
