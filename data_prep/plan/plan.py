"""The plan: which sample is which row of which part. Made once, by any number of tasks, then never changed.

Each task scans its share of the source files and commits one scan table per file (`scan/00000012.parquet`,
conditional put). The task that finds all scan tables in the store finishes the plan: it drops duplicates
across the dataset, shuffles the source files, splits their rows by bucket and shuffles them in windows;
`manifest.json` is written last and makes the plan exist. All of it is a function of the settings and the scan
tables only, so two tasks that finish together write the same bytes.

Memory: a window of rows (about 500 bytes each) for every bucket, one source file's compressed scan table
(some 60 bytes per row and its captions), and the bound of dedupe; so less than 1 GB as long as no source file
has millions of rows.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, PLAN_KEY, read_plan
from data_prep.dataset.records import read_object
from data_prep.dataset.schema import Manifest
from data_prep.images.buckets import make_buckets
from data_prep.plan.against import EvaluationSets, as_sources, evaluation_key, freeze_evaluation_files
from data_prep.plan.counts import Counts
from data_prep.plan.drop_list import freeze_drop_list, look_for_other_ids
from data_prep.plan.filters import Filters
from data_prep.plan.listing import (
    FILES_KEY,
    FOLDER,
    freeze_files,
    print_changed,
    print_newer_files,
    removed,
    source_counts,
)
from data_prep.plan.manifest import ManifestWriter
from data_prep.plan.scan import EVALUATION, SCAN, Scanner
from data_prep.plan.scan_tables import scan_key, write_scan
from data_prep.plan.verdicts import (
    COPIED,
    Verdicts,
    collect_copies,
    judge_rows,
    judged_tables,
    reasons_of,
)
from data_prep.sources.sample import printable
from data_prep.sources.source import OpenSources, Source, SourceFile, needs_sequential_reads
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.records import canonical_json, checked, seal
from model.common.share import Share

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

SETTINGS_KEY = "dataset.json"
VERDICT_ROWS = 1 << 24
"""Verdicts in memory at once."""

_DROPPED_COLUMNS = ("id", "key", "reason", "detail", "offset", "length", "path")
DROPPED = pa.schema([(name, SCAN.field(name).type) for name in _DROPPED_COLUMNS])
"""Columns of `dropped/<file number>.parquet`, with one row per sample that the plan left out."""


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
    make_buckets(config.buckets)

    created = check_settings(config, dataset, create=True)
    # A plan never changes, so a second run only reads it.
    if dataset.exists(Manifest.KEY):
        freeze_files(config, dataset)
        if share.index == 0:
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
            _remove_scan(dataset)
            dataset.delete(SETTINGS_KEY)
        raise
    _scan_share(config, dataset, files, evaluation, share)

    keys = _scan_keys(files, evaluation)
    # One listing, because a request per file takes minutes where there are many.
    scanned = set(dataset.list(f"{FOLDER}/"))
    missing = [place for place, key in enumerate(keys) if key not in scanned]

    # Another plan may have removed everything meanwhile (`_nothing_left`). What this one wrote since would be
    # taken for the scan of whatever settings come next.
    if not dataset.exists(SETTINGS_KEY):
        _remove_scan(dataset)
        raise removed(dataset, SETTINGS_KEY)

    if missing:
        # cluster/pairs.sh reads the numbers, to look whether these tasks are still in the queue.
        tasks = sorted({Share.owner(place, len(keys), share.count) for place in missing})
        print(
            f"plan: {len(missing)} of {len(keys)} source files are not scanned yet (tasks "
            f"{', '.join(map(str, tasks))}); the last task to scan finishes the plan"
        )
        return None
    return _finish(config, dataset, files, evaluation)


def _settings_record(config: DatasetConfig) -> dict[str, Any]:
    """Return the settings that decide which pairs a dataset holds."""
    record = asdict(config)
    # A dataset may be moved, and families added to it, without a change to its pairs.
    for name in ("store", "workers", "latents", "text"):
        del record[name]
    for source in record["sources"]:
        if source["scenes"] is None:
            del source["scenes"]  # records written before this setting existed do not have it
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


def dropped_key(number: int) -> str:
    """Key of the table of rows of source file `number` that the plan left out."""
    return f"dropped/{number:08d}.parquet"


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
) -> None:
    """Commit the missing scan tables of this share."""
    mine = share.owns(_scan_keys(files, evaluation))
    todo = set(mine) - set(dataset.list(f"{FOLDER}/"))
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


def _finish(
    config: DatasetConfig, dataset: Store, files: list[SourceFile], evaluation: list[SourceFile]
) -> Manifest:
    """Judge all scanned rows, and write the dropped tables, the manifest and the counts."""
    sets = EvaluationSets(config, dataset, evaluation) if evaluation else None
    reasons = reasons_of(config)
    with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:
        judged = judge_rows(config, dataset, files, Path(folder), sets)
        # Checked before any part is planned. In chunks, since `in` makes an array as long as its argument.
        chunks = range(0, len(judged.verdicts), VERDICT_ROWS)
        if not any((judged.verdicts[start : start + VERDICT_ROWS] <= COPIED).any() for start in chunks):
            _nothing_left(dataset, files, judged, reasons)

        writer = ManifestWriter(config, dataset, _window(config))
        counts = Counts(config, files, source_counts(dataset))
        path = Path(folder) / "dropped.parquet"
        with (
            closing(collect_copies(dataset, files, judged, Path(folder) / "copies")) as copies,
            Progress("plan", int(judged.starts[-1])) as progress,
        ):
            for number in file_order(config, files):
                with naming_full_disk(path), pq.ParquetWriter(path, DROPPED, compression="zstd") as dropped:
                    for table in judged_tables(dataset, number, judged.of(number), reasons, copies):
                        counts.add(files[number], table)
                        dropped.write_table(
                            table.filter(pc.not_equal(table["reason"], "")).select(DROPPED.names)
                        )
                        writer.add(table.filter(pc.equal(table["reason"], "")))
                        progress.advance(len(table))
                dataset.put_new(dropped_key(number), path.read_bytes())
        hashes = writer.finish()
        drop = judged.drop
        del judged  # closes the memory map before its folder is removed

    # A plan with wrong counts must not come to exist.
    counts.check(sum(sum(rows) for rows in writer.parts.values()))
    record = {**counts.record(), "manifest": hashes}
    if sets is not None:
        record["against"] = sets.counts()
    if drop is not None:
        record["drop"] = drop
    dataset.put_new(PLAN_KEY, seal(record))
    buckets = {name: rows for name, rows in sorted(writer.parts.items()) if rows}

    # Last, because the manifest makes the plan exist.
    manifest = Manifest(config.name, list(config.caption_kinds), buckets)
    dataset.put_new(Manifest.KEY, manifest.to_json())
    return manifest


def _window(config: DatasetConfig) -> int:
    """Return the number of rows to shuffle together.

    If images cannot be read at random (parquet with bytes), a part takes neighboring rows.
    """
    if needs_sequential_reads(config):
        return config.part_rows
    # A multiple of the part, so that only the last part of a bucket can have fewer rows.
    return config.part_rows * max(1, config.shuffle_window // config.part_rows)


def file_order(config: DatasetConfig, files: Sequence[SourceFile]) -> list[int]:
    """Return the numbers of the source files in the shuffled order in which the plan takes them."""
    # The 0 separates this random stream from those of the windows (`ManifestWriter`).
    return np.random.default_rng([config.seed, 0]).permutation(len(files)).tolist()


def _remove_scan(dataset: Store) -> None:
    """Remove the lists of files and all scan tables."""
    for key in list(dataset.list(f"{FOLDER}/")):
        dataset.delete(key)


def _nothing_left(dataset: Store, files: list[SourceFile], judged: Verdicts, reasons: dict[int, str]) -> None:
    """Remove what was written, so that other settings can be tried, and say why nothing is left.

    Raises:
        UserError: always.
    """
    counts: Counter[str] = Counter()
    for file in files:
        for table in judged_tables(dataset, file.number, judged.of(file.number), reasons, None):
            counts.update(table["reason"].to_pylist())

    # The settings after the scan, so that an interruption here still refuses other settings.
    _remove_scan(dataset)
    dataset.delete(SETTINGS_KEY)
    # Another task may have written more meanwhile. From here on it finds no settings and removes that itself.
    _remove_scan(dataset)

    top = ", ".join(f"{reason} ({count:,})" for reason, count in counts.most_common(4))
    raise UserError(
        f"no pairs left of {int(judged.starts[-1]):,} rows read: {top or 'the sources are empty'}: "
        "correct `sources`, `filters` or `buckets`"
    )
