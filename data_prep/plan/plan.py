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
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN, PLAN_KEY, read_plan
from data_prep.dataset.records import count_groups, parse_table, read_object
from data_prep.dataset.schema import Manifest
from data_prep.images.buckets import make_buckets
from data_prep.plan.copies import Copies
from data_prep.plan.counts import Counts
from data_prep.plan.dedupe import EXACT, NEAR, Spool, exact_duplicates, near_duplicates
from data_prep.plan.filters import Filters
from data_prep.plan.listing import (
    FILES_KEY,
    SOURCES_KEY,
    freeze_files,
    print_changed,
    print_newer_files,
    source_counts,
)
from data_prep.plan.manifest import ManifestWriter
from data_prep.plan.scan import SCAN, Scanner
from data_prep.sources.sample import printable
from data_prep.sources.source import OpenSources, SourceFile, needs_sequential_reads
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.records import canonical_json, checked, seal
from model.common.share import Share

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

SETTINGS_KEY = "dataset.json"
BATCH_ROWS = 8192
"""Rows of a row group of a scan table."""
VERDICT_ROWS = 1 << 24
"""Verdicts in memory at once."""

KEPT, COPIED, SAME_FILE, LOOKS_SAME, FILTERED = range(5)
"""Verdicts on a row: kept, kept and with exact duplicates, or dropped."""

_DROPPED_COLUMNS = ("id", "key", "reason", "detail", "offset", "length", "path")
DROPPED = pa.schema([(name, SCAN.field(name).type) for name in _DROPPED_COLUMNS])
"""Columns of `dropped/<file number>.parquet`, with one row per sample that the plan left out."""


def run_plan(config: DatasetConfig, dataset: Store, share: Share) -> Manifest | None:
    """Scan this share's source files, and finish the plan if all source files are scanned.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        share: the source files that this task scans.

    Returns:
        The plan, or None while other tasks still scan.

    Raises:
        UserError: if the settings differ from those of the dataset in the store, if a source has no files, or
        if no
            pair is left.
    """
    if not config.sources:
        raise UserError("sources is empty: name at least one source in the dataset's YAML")

    # Built here only to raise errors before hours of work.
    Filters(config.filters)
    make_buckets(config.buckets)

    check_settings(config, dataset, create=True)
    files = freeze_files(config, dataset)
    # A plan never changes, so a second run only reads it.
    if dataset.exists(Manifest.KEY):
        if share.index == 0:
            print_newer_files(config, dataset)
        return read_plan(dataset)

    _scan_share(config, dataset, files, share)
    missing = [place for place, file in enumerate(files) if not dataset.exists(_scan_key(file.number))]
    if missing:
        # cluster/pairs.sh reads the numbers, to look whether these tasks are still in the queue.
        tasks = sorted({Share.owner(place, len(files), share.count) for place in missing})
        print(
            f"plan: {len(missing)} of {len(files)} source files are not scanned yet (tasks "
            f"{', '.join(map(str, tasks))}); the last task to scan finishes the plan"
        )
        return None
    return _finish(config, dataset, files)


def _settings_record(config: DatasetConfig) -> dict[str, Any]:
    """Return the settings that decide which pairs a dataset holds."""
    record = asdict(config)
    # A dataset may be moved, and families added to it, without a change to its pairs.
    for name in ("store", "workers", "latents", "text"):
        del record[name]
    for source in record["sources"]:
        if source["scenes"] is None:
            del source["scenes"]  # records written before this setting existed do not have it
    return record


def check_settings(config: DatasetConfig, dataset: Store, create: bool = False) -> None:
    """Compare the settings with those that the dataset was planned with.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        create: store the settings if the dataset has none yet.

    Raises:
        UserError: if they differ (the message names the keys), or if there is no plan and `create` is off.
    """
    record = _settings_record(config)
    if create and dataset.put_new(SETTINGS_KEY, canonical_json(record)):
        return
    try:
        stored = read_object(dataset, SETTINGS_KEY, partial(checked, dict[str, Any]), PLAN_AGAIN)
    except FileNotFoundError as error:
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


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 120 else text[:117] + "..."


def dropped_key(number: int) -> str:
    """Key of the table of rows of source file `number` that the plan left out."""
    return f"dropped/{number:08d}.parquet"


def _scan_key(number: int) -> str:
    return f"scan/{number:08d}.parquet"


def _scan_share(config: DatasetConfig, dataset: Store, files: list[SourceFile], share: Share) -> None:
    """Commit the missing scan tables of this share."""
    mine = share.owns(files)
    todo = [file for file in mine if not dataset.exists(_scan_key(file.number))]
    if len(todo) < len(mine):
        print(f"plan: {len(mine) - len(todo)} of {len(mine)} source files were scanned before")

    sources = OpenSources(config, files)
    with (
        Scanner(config) as scanner,
        Progress("scan", None) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = Path(folder) / "scan.parquet"
        for file in todo:
            source, _ = sources.open(file.number)
            try:
                _write_scan(path, file, scanner.scan(source, file), progress)
            except FileNotFoundError as error:
                raise UserError(
                    f"source file {file.label}: was listed, and does not exist any more: put it back, or "
                    f"delete {dataset.uri}/scan to list and scan the sources again"
                ) from error
            # If another task has scanned the same file meanwhile, its table has the same rows.
            dataset.put_new(_scan_key(file.number), path.read_bytes())
    # Last, so that a file that was still being written while it was read is named too.
    print_changed("plan", sources.changed(file.number for file in todo))


def _write_scan(path: Path, file: SourceFile, batches: Iterator[pa.RecordBatch], progress: Progress) -> None:
    """Write a source file's scan table, and check that its ids are complete and in order."""
    rows = 0
    with (
        naming_full_disk(path),
        pq.ParquetWriter(path, SCAN, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in _large_batches(batches):
            first = file.number << 32 | rows
            if batch.column("id").to_pylist() != list(range(first, first + len(batch))):
                raise RuntimeError(f"{file.label}: rows were lost or read twice while scanning")
            rows += len(batch)
            writer.write_batch(batch)
            for reason, count in Counter(batch.column("reason").to_pylist()).items():
                progress.advance(count, reason or "kept")


def _large_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Join batches to at least `BATCH_ROWS` rows; only the last may have fewer."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= BATCH_ROWS:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _finish(config: DatasetConfig, dataset: Store, files: list[SourceFile]) -> Manifest:
    """Judge all scanned rows, and write the dropped tables, the manifest and the counts."""
    with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:
        starts, verdicts = _find_duplicates(config, dataset, files, Path(folder))
        # Checked before any part is planned. In chunks, since `in` makes an array as long as its argument.
        chunks = range(0, len(verdicts), VERDICT_ROWS)
        if not any((verdicts[start : start + VERDICT_ROWS] <= COPIED).any() for start in chunks):
            _nothing_left(dataset, files, starts, verdicts)

        writer = ManifestWriter(config, dataset, _window(config))
        counts = Counts(config, files, source_counts(dataset))
        path = Path(folder) / "dropped.parquet"
        with (
            closing(_collect_copies(dataset, files, starts, verdicts, Path(folder) / "copies")) as copies,
            Progress("plan", int(starts[-1])) as progress,
        ):
            for number in file_order(config, files):
                own = slice(starts[number], starts[number + 1])
                with naming_full_disk(path), pq.ParquetWriter(path, DROPPED, compression="zstd") as dropped:
                    for table in _judged(dataset, number, verdicts[own], copies):
                        counts.add(files[number], table)
                        dropped.write_table(
                            table.filter(pc.not_equal(table["reason"], "")).select(DROPPED.names)
                        )
                        writer.add(table.filter(pc.equal(table["reason"], "")))
                        progress.advance(len(table))
                dataset.put_new(dropped_key(number), path.read_bytes())
        hashes = writer.finish()
        del verdicts  # closes the memory map before its folder is removed

    # A plan with wrong counts must not come to exist.
    counts.check(sum(sum(rows) for rows in writer.parts.values()))
    dataset.put_new(PLAN_KEY, seal({**counts.record(), "manifest": hashes}))
    buckets = {name: rows for name, rows in sorted(writer.parts.items()) if rows}

    # Written last, because the manifest makes the plan exist.
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


def _find_duplicates(
    config: DatasetConfig, dataset: Store, files: list[SourceFile], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Judge all rows.

    Args:
        config: the dataset's settings.
        dataset: the dataset's store.
        files: all source files, which are scanned.
        folder: temporary folder for hashes and verdicts.

    Returns:
        The number of the first row of each file, int64 [files + 1], and a verdict per row, uint8 [rows],
        which is a memory map in `folder`.
    """
    spool = Spool(folder, "hashes")
    path = folder / "verdicts"
    starts = _collect_hashes(dataset, files, spool, path)
    # NumPy cannot map an empty file.
    if not starts[-1]:
        return starts, np.empty(0, np.uint8)
    verdicts = np.memmap(path, np.uint8, "r+")

    if config.dedupe.exact:
        for ids, firsts in exact_duplicates(spool):
            verdicts[_positions(ids, starts)] = SAME_FILE
            verdicts[_positions(firsts, starts)] = COPIED
    spool.close()

    # After the exact duplicates, so that of equal files only one is compared.
    if config.dedupe.near is not None:
        spool = Spool(folder, "phashes")
        _collect_perceptual_hashes(dataset, files, spool, starts, verdicts)
        for ids in near_duplicates(spool, config.dedupe.near):
            verdicts[_positions(ids, starts)] = LOOKS_SAME
        spool.close()
    return starts, verdicts


def _collect_hashes(dataset: Store, files: list[SourceFile], spool: Spool, verdicts: Path) -> np.ndarray:
    """Spool the hashes of all rows that passed the filters, and write the first verdicts to a file.

    Returns:
        The number of the first row of each file, int64 [files + 1].
    """
    starts = [0]
    with verdicts.open("wb") as out:
        for file in files:
            rows = 0
            for table in _read_scan(dataset, file.number, ["id", "reason", "hash"]):
                # A row that a filter dropped is not judged again, nor does it make another a duplicate.
                passed = pc.equal(table["reason"], "").to_numpy()
                spool.add(exact_hashes(table["hash"])[passed], table["id"].to_numpy()[passed])
                with naming_full_disk(verdicts):
                    out.write(np.where(passed, KEPT, FILTERED).astype(np.uint8).tobytes())
                rows += len(table)
            starts.append(starts[-1] + rows)
    return np.array(starts, np.int64)


def _collect_perceptual_hashes(
    dataset: Store, files: list[SourceFile], spool: Spool, starts: np.ndarray, verdicts: np.ndarray
) -> None:
    """Spool the perceptual hashes of all rows that are still kept."""
    for file in files:
        row = int(starts[file.number])
        for table in _read_scan(dataset, file.number, ["id", "phash"]):
            kept = verdicts[row : row + len(table)] <= COPIED
            spool.add(exact_hashes(table["phash"])[kept], table["id"].to_numpy()[kept])
            row += len(table)


def exact_hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of hashes as uint64, bit for bit; 0 for rows without an image.

    pyarrow turns integers beside nulls into float64, which keeps only 53 of their 64 bits.
    """
    return pc.fill_null(column, 0).to_numpy()


def _positions(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the row numbers, over all files, of sample ids (see `sources.source`)."""
    return starts[ids >> 32] + (ids & 0xFFFFFFFF)


def _read_scan(dataset: Store, number: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a source file's scan table, some thousand rows at a time."""
    key = _scan_key(number)
    way_out = "delete it and run plan again"

    def parse(data: bytes) -> tuple[bytes, int]:
        return data, count_groups(data, SCAN)

    data, groups = read_object(dataset, key, parse, way_out)
    for group in range(groups):
        try:
            table = parse_table(data, SCAN, columns, group)
        except ValueError as error:
            raise StoreError(f"{dataset.uri}/{key}: damaged: {error}: {way_out}") from error
        yield table


def _collect_copies(
    dataset: Store, files: list[SourceFile], starts: np.ndarray, verdicts: np.ndarray, path: Path
) -> Copies:
    """Store the captions of all exact duplicates."""
    copies = Copies(path)
    for file in files:
        judged = verdicts[starts[file.number] : starts[file.number + 1]]
        if SAME_FILE not in judged:
            continue

        row = 0
        for table in _read_scan(dataset, file.number, ["id", "hash", "captions"]):
            copies.add(table.take(np.flatnonzero(judged[row : row + len(table)] == SAME_FILE)))
            row += len(table)
    copies.complete()
    return copies


def _judged(dataset: Store, number: int, verdicts: np.ndarray, copies: Copies | None) -> Iterator[pa.Table]:
    """Yield a source file's scan table with the reasons of duplicates filled in, and their captions handed to
    the rows that stay."""
    row = 0
    for table in _read_scan(dataset, number):
        verdict = verdicts[row : row + len(table)]
        row += len(table)

        reasons = np.array(table["reason"].to_pylist(), object)
        reasons[verdict == SAME_FILE] = EXACT
        reasons[verdict == LOOKS_SAME] = NEAR
        column = table.schema.get_field_index("reason")
        table = table.set_column(column, "reason", pa.array(reasons.tolist(), pa.string()))

        copied = np.flatnonzero(verdict == COPIED).tolist()
        yield copies.hand_over(table, copied) if copies and copied else table


def _nothing_left(dataset: Store, files: list[SourceFile], starts: np.ndarray, verdicts: np.ndarray) -> None:
    """Remove what was written, so that other settings can be tried, and say why nothing is left.

    Raises:
        UserError: always.
    """
    reasons: Counter[str] = Counter()
    for file in files:
        judged = verdicts[starts[file.number] : starts[file.number + 1]]
        for table in _judged(dataset, file.number, judged, None):
            reasons.update(table["reason"].to_pylist())

    # The settings last, so that an interruption here still refuses other settings.
    for key in [_scan_key(file.number) for file in files] + [FILES_KEY, SOURCES_KEY, SETTINGS_KEY]:
        dataset.delete(key)

    top = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(4))
    raise UserError(
        f"no pairs left of {int(starts[-1]):,} rows read: {top or 'the sources are empty'}: "
        "correct `sources`, `filters` or `buckets`"
    )
