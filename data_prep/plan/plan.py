"""The plan: which sample is which row of which part. Made once, by any number of tasks, then never changed.

Each task scans its share of the source files and commits one scan table per file (`scan/00000012.parquet`,
conditional put). The tasks that find all scan tables in the store finish the plan together (`finish`): they
drop duplicates across the dataset, shuffle the source files, split their rows by bucket and shuffle them in
windows; `manifest.json` is written last and makes the plan exist. All of it is a function of the settings and
the scan tables only, so any number of tasks, killed at any moment, write the same bytes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, read_plan
from data_prep.dataset.records import read_object
from data_prep.dataset.schema import Manifest
from data_prep.images.buckets import make_buckets
from data_prep.plan.against import as_sources, evaluation_key, freeze_evaluation_files
from data_prep.plan.drop_list import freeze_drop_list, look_for_other_ids
from data_prep.plan.filters import Filters
from data_prep.plan.finish import SETTINGS_KEY, finish_plan, remove_scan, remove_units
from data_prep.plan.listing import (
    FILES_KEY,
    FOLDER,
    freeze_files,
    print_changed,
    print_newer_files,
    removed,
)
from data_prep.plan.scan import EVALUATION, SCAN, Scanner
from data_prep.plan.scan_tables import scan_key, write_scan
from data_prep.sources.sample import printable
from data_prep.sources.source import OpenSources, Source, SourceFile
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.progress import Progress
from model.common.records import canonical_json, checked
from model.common.share import Share


def run_plan(config: DatasetConfig, dataset: Store, share: Share) -> Manifest | None:
    """Scan this share's files, and finish the plan if the files of all tasks are scanned.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        share: the source files that this task scans.

    Returns:
        The plan, or None while other tasks still scan.

    Raises:
        UserError: if the settings differ from those of the dataset in the store, if a source or an evaluation
            set has no files, if the drop list cannot be read or has changed, or if no pair is left.
    """
    if not config.sources:
        raise UserError("sources is empty: name at least one source in the dataset's YAML")

    # Built here only to raise errors before hours of work.
    Filters(config.filters)
    make_buckets(config.buckets, config.clip_frames)

    created = check_settings(config, dataset, create=True)
    # A plan never changes, so a second run only reads it.
    if dataset.exists(Manifest.KEY):
        freeze_files(config, dataset)
        if share.index == 0:
            remove_units(dataset)  # of a task that was killed right after it finished the plan
            print_newer_files(config, dataset)
            look_for_other_ids(config.dedupe.drop, dataset)
        return read_plan(dataset)

    try:
        freeze_drop_list(config.dedupe.drop, dataset)
        evaluation = freeze_evaluation_files(config, dataset)
        files = freeze_files(config, dataset)
    except UserError as error:
        # Without a list of files no task scans yet, so a wrong path can be corrected under the same name.
        if created and not isinstance(error, StoreError) and not dataset.exists(FILES_KEY):
            remove_scan(dataset)
            dataset.delete(SETTINGS_KEY)
        raise
    keys = _scan_keys(files, evaluation)
    # One listing, because a request per file takes minutes where there are many.
    scanned = set(dataset.list(f"{FOLDER}/"))
    if not scanned.issuperset(keys):
        # Of tables that do not exist any more: what is scanned now may differ.
        remove_units(dataset)
    _scan_share(config, dataset, files, evaluation, share, scanned)

    scanned = set(dataset.list(f"{FOLDER}/"))
    missing = [place for place, key in enumerate(keys) if key not in scanned]

    # Another plan may have removed everything meanwhile (`_nothing_left`). What this one wrote since would be
    # taken for the scan of whatever settings come next.
    if not dataset.exists(SETTINGS_KEY):
        remove_scan(dataset)
        raise removed(dataset, SETTINGS_KEY)

    if missing:
        # cluster/pairs.sh reads the numbers, to look whether these tasks are still in the queue.
        tasks = sorted({Share.owner(place, len(keys), share.count) for place in missing})
        print(
            f"plan: {len(missing)} of {len(keys)} source files are not scanned yet (tasks "
            f"{', '.join(map(str, tasks))}); the last task to scan finishes the plan"
        )
        return None
    return finish_plan(config, dataset, files, evaluation, share)


def _settings_record(config: DatasetConfig) -> dict[str, Any]:
    """Return the settings that decide which pairs a dataset holds."""
    record = asdict(config)
    # A dataset may be moved, and families and users added to it, without a change to its pairs.
    for name in ("store", "workers", "latents", "text", "users"):
        del record[name]
    for source in record["sources"]:
        if source["scenes"] is None:
            del source["scenes"]  # records written before this setting existed do not have it
    if record["clips"] is None:
        del record["clips"]
    for name in ("against", "drop"):
        if record["dedupe"][name] is None:
            del record["dedupe"][name]  # these neither
    return record


def check_settings(config: DatasetConfig, dataset: Store, create: bool = False) -> bool:
    """Compare the settings with those that the dataset was planned with.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        create: store the settings if the dataset has none yet.

    Returns:
        True if this call stored them.

    Raises:
        UserError: if they differ (the message names the keys), or if there is no plan and `create` is off.
    """
    record = _settings_record(config)
    if create and dataset.put_new(SETTINGS_KEY, canonical_json(record)):
        return True
    try:
        stored = read_object(dataset, SETTINGS_KEY, partial(checked, dict[str, Any]), PLAN_AGAIN)
    except FileNotFoundError as error:
        if create:
            raise removed(dataset, SETTINGS_KEY) from error
        command = "python -m data_prep plan DATASET.yaml"
        raise UserError(f"{dataset.uri}: no plan yet: run `{command}` first") from error

    # Through JSON like the stored settings, so that both have the same types.
    current = json.loads(canonical_json(record))
    differences = []
    for name in sorted({*current, *stored}):
        if current.get(name) != stored.get(name):
            was, now = _short(stored.get(name)), _short(current.get(name))
            differences.append(f"`{printable(name)[:120]}` was {was}, is {now}")
    if differences:
        raise UserError(
            f"{dataset.uri} was planned with other settings: {'; '.join(differences)}: "
            "put them back, or give the dataset another `name`"
        )
    return False


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 120 else text[:117] + "..."


def _scan_keys(files: list[SourceFile], evaluation: list[SourceFile]) -> list[str]:
    """Return the keys of all scanned files' tables, in the order in which array tasks share them."""
    return [
        *(scan_key(file.number) for file in files),
        *(evaluation_key(file.number) for file in evaluation),
    ]


class _Scan(NamedTuple):
    """The scan of one file."""

    key: str
    schema: pa.Schema
    sources: OpenSources
    file: SourceFile
    what: str
    rows: Callable[[Source, SourceFile], Iterator[pa.RecordBatch]]


def _scan_share(
    config: DatasetConfig,
    dataset: Store,
    files: list[SourceFile],
    evaluation: list[SourceFile],
    share: Share,
    scanned: set[str],
) -> None:
    """Commit the scan tables of this share that are not among those `scanned`."""
    mine = share.owns(_scan_keys(files, evaluation))
    todo = set(mine) - scanned
    if len(todo) < len(mine):
        print(f"plan: {len(mine) - len(todo)} of {len(mine)} source files were scanned before")

    settings = as_sources(config)
    pairs, sets = OpenSources(config, files), OpenSources(settings, evaluation)
    with (
        Scanner(config) as scanner,
        Progress("scan", None) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):

        def hash_images(source: Source, file: SourceFile) -> Iterator[pa.RecordBatch]:
            return scanner.hash_images(source, file, settings.sources[file.source].limit)

        scans = [
            *(_Scan(scan_key(file.number), SCAN, pairs, file, "source file", scanner.scan) for file in files),
            *(
                _Scan(evaluation_key(file.number), EVALUATION, sets, file, "evaluation file", hash_images)
                for file in evaluation
            ),
        ]
        todo = [scan for scan in scans if scan.key in todo]
        for scan in todo:
            _commit_scan(dataset, scan, Path(folder) / "scan.parquet", progress)

    # Last, so that a file that was still being written while it was read is named too.
    for sources in (pairs, sets):
        own = [scan.file.number for scan in todo if scan.sources is sources]
        print_changed("plan", sources.changed(own))


def _commit_scan(dataset: Store, scan: _Scan, path: Path, progress: Progress) -> None:
    """Scan one file into a temporary table at `path`, and commit it."""
    source, _ = scan.sources.open(scan.file.number)
    try:
        write_scan(path, scan.schema, scan.file, scan.rows(source, scan.file), progress)
    except FileNotFoundError as error:
        raise UserError(
            f"{scan.what} {scan.file.label}: was listed, and does not exist any more: put it back, or "
            f"delete {dataset.uri}/{FOLDER} to list and scan the sources again"
        ) from error
    # If another task has scanned the same file meanwhile, its table has the same rows.
    dataset.put_new(scan.key, path.read_bytes())
