"""The plan: which sample is which row of which part. Made once, by any number of tasks, then never changed.

Each task scans its share of the source files and commits one scan table a file (`scan/00000012.parquet`, conditional put). The
task that finds all of them there finishes: duplicates across the dataset go, source files are shuffled, their rows are cut by
bucket and shuffled in windows, and `manifest.json`, written last, makes the plan exist. All of it is a function of the settings
and the scan tables alone, so two tasks that finish together write the same bytes.

Memory: a window of rows (about 500 bytes each) for every bucket, one source file's scan table as compressed (some 60 bytes a row
and its captions), and dedupe's bound; so under 1 GB as long as no source file has millions of rows.
"""

import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_KEY
from data_prep.dataset.schema import Manifest, canonical_json
from data_prep.images.buckets import make_buckets
from data_prep.plan.dedupe import EXACT, NEAR, Spool, exact_duplicates, near_duplicates
from data_prep.plan.filters import Filters
from data_prep.plan.manifest import ManifestWriter
from data_prep.plan.scan import SCAN, Scanner
from data_prep.sources.source import OpenSources, SourceFile, list_files, reads_along
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.files import naming_full_disk
from model.common.progress import Progress
from model.common.share import Share

pc: Any = pyarrow.compute
"""Its functions are made at import, where type checkers do not see them."""

SETTINGS_KEY = "dataset.json"
FILES_KEY = "scan/files.json"
KEPT, SAME_FILE, LOOKS_SAME, FILTERED = 0, 1, 2, 3
CHUNK = 1 << 24

DROPPED = pa.schema([(name, SCAN.field(name).type) for name in ("id", "key", "reason", "detail", "offset", "length", "path")])
"""A row a sample left out by the plan, in `dropped/<file number>.parquet`."""


def run_plan(config: DatasetConfig, dataset: Store, share: Share) -> Manifest | None:
    """Scan this share's source files; finish the plan if all of them are scanned.

    Returns:
        The plan, or None while other tasks still scan.

    Raises:
        UserError: the settings are not those of the store's dataset, a source has no files, or no pair is left.
    """
    if not config.sources:
        raise UserError("sources is empty: name at least one source in the dataset's YAML")
    Filters(config.filters)
    make_buckets(config.buckets)
    check_settings(config, dataset, create=True)
    files = _freeze_files(config, dataset)
    if dataset.exists(Manifest.KEY):
        return Manifest.from_json(dataset.read(Manifest.KEY))
    _scan_share(config, dataset, files, share)
    missing = [file.number for file in files if not dataset.exists(_scan_key(file.number))]
    if missing:
        print(f"plan: {len(missing)} of {len(files)} source files are not scanned yet; the last task to scan finishes the plan")
        return None
    return _finish(config, dataset, files)


def settings_record(config: DatasetConfig) -> dict[str, Any]:
    """The settings that decide which pairs a dataset holds."""
    record = asdict(config)
    for name in ("store", "workers", "latents", "text"):
        del record[name]
    for source in record["sources"]:
        if source["scenes"] is None:
            del source["scenes"]  # so that the records of other sources stay what they were
    return record


def check_settings(config: DatasetConfig, dataset: Store, create: bool = False) -> None:
    """Compare the settings with those that the dataset was planned with.

    Raises:
        UserError: they differ (the message names the keys), or there is no plan and `create` is off.
    """
    record = settings_record(config)
    if create and dataset.put_new(SETTINGS_KEY, canonical_json(record)):
        return
    try:
        stored = json.loads(dataset.read(SETTINGS_KEY))
    except FileNotFoundError as error:
        raise UserError(f"{dataset.uri}: no plan yet: run `python -m data_prep plan DATASET.yaml` first") from error
    ours = json.loads(canonical_json(record))
    differing = [name for name in sorted({*ours, *stored}) if ours.get(name) != stored.get(name)]
    if differing:
        what = "; ".join(f"`{name}` was {_short(stored.get(name))}, is {_short(ours.get(name))}" for name in differing)
        raise UserError(
            f"{dataset.uri} was planned with other settings: {what}: put them back, or give the dataset another `name`"
        )


def source_files(dataset: Store) -> list[SourceFile]:
    """The dataset's frozen list of source files."""
    return [SourceFile(*entry) for entry in json.loads(dataset.read(FILES_KEY))]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _scan_key(number: int) -> str:
    return f"scan/{number:08d}.parquet"


def dropped_key(number: int) -> str:
    """Key of the table of rows of source file `number` that the plan left out."""
    return f"dropped/{number:08d}.parquet"


def _freeze_files(config: DatasetConfig, dataset: Store) -> list[SourceFile]:
    """List the source files once for all tasks: files that come later must not move the ids of those that are there."""
    if not dataset.exists(FILES_KEY):
        files = list_files(config)
        dataset.put_new(FILES_KEY, canonical_json([[file.number, file.source, file.name] for file in files]))
    return source_files(dataset)


def _scan_share(config: DatasetConfig, dataset: Store, files: list[SourceFile], share: Share) -> None:
    mine = share.owns(files)
    todo = [file for file in mine if not dataset.exists(_scan_key(file.number))]
    sources = OpenSources(config, files)
    with Scanner(config) as scanner, Progress("scan", None) as progress, tempfile.TemporaryDirectory() as folder:
        if len(todo) < len(mine):
            print(f"plan: {len(mine) - len(todo)} of {len(mine)} source files were scanned before")
        for file in todo:
            source, _ = sources.of(file.number)
            path = Path(folder) / "scan.parquet"
            rows = 0
            with naming_full_disk(path), pq.ParquetWriter(path, SCAN, compression="zstd") as writer:
                for batch in _large_batches(scanner.scan(source, file)):
                    if batch.column("id").to_pylist() != list(
                        range(file.number << 32 | rows, (file.number << 32 | rows) + len(batch))
                    ):
                        raise RuntimeError(f"{file.label}: rows were lost or came twice while scanning")
                    rows += len(batch)
                    writer.write_batch(batch)
                    for reason, count in Counter(batch.column("reason").to_pylist()).items():
                        progress.advance(count, reason or "kept")
            dataset.put_new(_scan_key(file.number), path.read_bytes())


def _large_batches(batches: Iterator[pa.RecordBatch], rows: int = 8192) -> Iterator[pa.RecordBatch]:
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= rows:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _finish(config: DatasetConfig, dataset: Store, files: list[SourceFile]) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:
        starts, verdicts = _find_duplicates(config, dataset, files, Path(folder))
        if not any(KEPT in verdicts[start : start + CHUNK] for start in range(0, len(verdicts), CHUNK)):
            _nothing_left(dataset, files, starts, verdicts)
        writer = ManifestWriter(config, dataset, _window(config))
        counts = _Counts(config, files)
        with Progress("plan", int(starts[-1])) as progress:
            for number in file_order(config, files):
                path = Path(folder) / "dropped.parquet"
                with naming_full_disk(path), pq.ParquetWriter(path, DROPPED, compression="zstd") as out:
                    for table in _judged(dataset, number, verdicts[starts[number] : starts[number + 1]]):
                        counts.add(files[number], table)
                        out.write_table(table.filter(pc.not_equal(table["reason"], "")).select(DROPPED.names))
                        writer.add(table.filter(pc.equal(table["reason"], "")))
                        progress.advance(len(table))
                dataset.put_new(dropped_key(number), path.read_bytes())
        hashes = writer.finish()
        del verdicts
    counts.check(sum(sum(rows) for rows in writer.parts.values()))
    dataset.put_new(PLAN_KEY, canonical_json({**counts.record(), "manifest": hashes}))
    manifest = Manifest(
        config.name, list(config.caption_kinds), {name: rows for name, rows in sorted(writer.parts.items()) if rows}
    )
    dataset.put_new(Manifest.KEY, manifest.to_json())
    return manifest


def _window(config: DatasetConfig) -> int:
    """Rows to shuffle over; where images cannot be read alone (parquet with bytes), a part takes neighbouring rows."""
    return config.part_rows * (1 if reads_along(config) else max(1, config.shuffle_window // config.part_rows))


def file_order(config: DatasetConfig, files: Sequence[SourceFile]) -> list[int]:
    """Numbers of the source files in the shuffled order in which the plan takes them."""
    return np.random.default_rng([config.seed, 0]).permutation(len(files)).tolist()


def _find_duplicates(
    config: DatasetConfig, dataset: Store, files: list[SourceFile], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Where each file's rows start, int64 [files + 1], and a verdict a row, uint8 [rows], in a file."""
    spool = Spool(folder, "hashes")
    starts = [0]
    path = folder / "verdicts"
    with path.open("wb") as out:
        for file in files:
            starts.append(starts[-1])
            for table in _read_scan(dataset, file.number, ["id", "reason", "hash"]):
                keep = pc.equal(table["reason"], "").to_numpy()
                spool.add(table["hash"].to_numpy()[keep], table["id"].to_numpy()[keep])
                # A row that a filter dropped is no longer judged, nor does it make another a duplicate.
                with naming_full_disk(path):
                    out.write(np.where(keep, KEPT, FILTERED).astype(np.uint8).tobytes())
                starts[-1] += len(table)
    offsets = np.array(starts, np.int64)
    if not starts[-1]:
        return offsets, np.empty(0, np.uint8)
    verdicts = np.memmap(path, np.uint8, "r+")
    if config.dedupe.exact:
        for ids in exact_duplicates(spool):
            verdicts[_positions(ids, offsets)] = SAME_FILE
    spool.close()
    if config.dedupe.near is not None:
        spool = Spool(folder, "phashes")
        for file in files:
            row = starts[file.number]
            for table in _read_scan(dataset, file.number, ["id", "phash"]):
                keep = verdicts[row : row + len(table)] == KEPT
                spool.add(table["phash"].to_numpy()[keep].astype(np.uint64), table["id"].to_numpy()[keep])
                row += len(table)
        for ids in near_duplicates(spool, config.dedupe.near):
            verdicts[_positions(ids, offsets)] = LOOKS_SAME
        spool.close()
    return offsets, verdicts


def _positions(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return starts[ids >> 32] + (ids & 0xFFFFFFFF)


def _read_scan(dataset: Store, number: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A source file's scan table, some thousand rows at a time."""
    table = pq.ParquetFile(io.BytesIO(dataset.read(_scan_key(number))))
    return (table.read_row_group(group, columns) for group in range(table.num_row_groups))


def _judged(dataset: Store, number: int, verdicts: np.ndarray) -> Iterator[pa.Table]:
    """A source file's scan table with the duplicates' reasons filled in."""
    row = 0
    for table in _read_scan(dataset, number):
        here = verdicts[row : row + len(table)]
        reasons = np.array(table["reason"].to_pylist(), object)
        reasons[here == SAME_FILE] = EXACT
        reasons[here == LOOKS_SAME] = NEAR
        row += len(table)
        yield table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(reasons.tolist(), pa.string()))


def _nothing_left(dataset: Store, files: list[SourceFile], starts: np.ndarray, verdicts: np.ndarray) -> None:
    """Take back what was written, and say why nothing is left.

    Raises:
        UserError: always.
    """
    reasons: Counter[str] = Counter()
    for file in files:
        for table in _judged(dataset, file.number, verdicts[starts[file.number] : starts[file.number + 1]]):
            reasons.update(table["reason"].to_pylist())
    for key in [_scan_key(file.number) for file in files] + [FILES_KEY, SETTINGS_KEY]:
        dataset.delete(key)
    most = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(4)) or "the sources are empty"
    raise UserError(f"no pairs left of {int(starts[-1]):,} rows read: {most}: correct `sources`, `filters` or `buckets`")


class _Counts:
    """What the plan read, kept and dropped, by source file; a file comes in pieces that follow one another."""

    def __init__(self, config: DatasetConfig, files: Sequence[SourceFile]) -> None:
        self._kinds = config.caption_kinds
        self._files = [{"number": file.number, "label": file.label, "rows": 0, "kept": 0, "dropped": {}} for file in files]
        self._captions: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def add(self, file: SourceFile, table: pa.Table) -> None:
        """Count some rows of a source file."""
        reasons = Counter(table["reason"].to_pylist())
        count = self._files[file.number]
        count["rows"] += len(table)
        count["kept"] += reasons.pop("", 0)
        count["dropped"] = dict(Counter(count["dropped"]) + reasons)
        self._refused.update(itertools.chain.from_iterable(table["refused"].to_pylist()))
        captions = table.filter(pc.equal(table["reason"], ""))["captions"].combine_chunks().flatten()
        for kind, letters in zip(
            captions.field("kind").to_pylist(), pc.utf8_length(captions.field("text")).to_pylist(), strict=True
        ):
            self._captions[self._kinds[kind]] += 1
            self._letters[self._kinds[kind]] += letters

    def check(self, planned: int) -> None:
        """Hold what was kept against what the parts hold, and what was read against both."""
        for file in self._files:
            if file["rows"] != file["kept"] + sum(file["dropped"].values()):
                raise RuntimeError(f"{file['label']}: {file['rows']} rows read, {file['kept']} kept, {file['dropped']} dropped")
        kept = sum(file["kept"] for file in self._files)
        if kept != planned:
            raise RuntimeError(f"{kept} rows were kept but {planned} are planned")

    def record(self) -> dict[str, Any]:
        """For `manifest/plan.json`."""
        return {
            "files": self._files,
            "captions": {"kept": dict(self._captions), "letters": dict(self._letters), "refused": dict(self._refused)},
        }
