"""The step that scans the source files and the files of the evaluation sets, with one table per file."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data_prep.config import DatasetConfig
from data_prep.engines import Do, Outcome, Step
from data_prep.plan.against import as_sources, evaluation_key
from data_prep.plan.listing import FOLDER, print_changed
from data_prep.plan.scan import EVALUATION, SCAN, Scanner
from data_prep.plan.scan_tables import scan_key, write_scan
from data_prep.sources.source import OpenSources, Source, SourceFile
from data_prep.store.store import Store
from model.common.errors import UserError


class _Scan(NamedTuple):
    """The scan of one file."""

    schema: pa.Schema
    sources: OpenSources
    file: SourceFile
    what: str
    rows: Callable[[Source, SourceFile], Iterator[pa.RecordBatch]]


class ScanStep(Step):
    """The scan of all files; its units are the keys of their tables."""

    title = "scan"
    noun = "rows"

    def __init__(
        self,
        config: DatasetConfig,
        dataset: Store,
        files: Sequence[SourceFile],
        evaluation: Sequence[SourceFile],
    ) -> None:
        """Scan nothing yet.

        Args:
            config: the dataset's settings.
            dataset: the dataset's store.
            files: the source files.
            evaluation: the files of the evaluation sets.
        """
        self.cpus = max(1, config.workers)
        self._config = config
        self._dataset = dataset
        self._settings = as_sources(config)
        self._pairs = OpenSources(config, list(files))
        self._sets = OpenSources(self._settings, list(evaluation))
        # In the order in which array tasks share them.
        self._files = {scan_key(file.number): (self._pairs, file) for file in files}
        self._files |= {evaluation_key(file.number): (self._sets, file) for file in evaluation}
        self.units = list(self._files)

    def missing(self) -> list[str]:
        """Return the keys of the tables that are missing."""
        # One listing, because a request per file takes minutes where there are many.
        scanned = set(self._dataset.list(f"{FOLDER}/"))
        return [key for key in self.units if key not in scanned]

    def exists(self, unit: str) -> bool:
        """True if the file is scanned."""
        return self._dataset.exists(unit)

    def total(self, units: object) -> None:
        """Return None: only the scan shows how many rows the files have."""
        return

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Start the processes that inspect images."""
        with Scanner(self._config) as scanner, tempfile.TemporaryDirectory() as folder:

            def hash_images(source: Source, file: SourceFile) -> Iterator[pa.RecordBatch]:
                return scanner.hash_images(source, file, self._settings.sources[file.source].limit)

            def do(keys: Sequence[str]) -> Iterator[Outcome]:
                for key in keys:
                    sources, file = self._files[key]
                    if sources is self._pairs:
                        scan = _Scan(SCAN, sources, file, "source file", scanner.scan)
                    else:
                        scan = _Scan(EVALUATION, sources, file, "evaluation file", hash_images)
                    yield from self._commit(key, scan, Path(folder) / "scan.parquet")

            yield do

    def print_changed(self, keys: Sequence[str]) -> None:
        """Print how many of some files, which were scanned now, have changed since they were listed."""
        for sources in (self._pairs, self._sets):
            own = [self._files[key][1].number for key in keys if self._files[key][0] is sources]
            print_changed("plan", sources.changed(own))

    def _commit(self, key: str, scan: _Scan, path: Path) -> Iterator[Outcome]:
        """Scan one file into a temporary table at `path`, and commit it."""
        source, _ = scan.sources.open(scan.file.number)
        try:
            for counts in write_scan(path, scan.schema, scan.file, scan.rows(source, scan.file)):
                yield Outcome(counts)
        except FileNotFoundError as error:
            raise UserError(
                f"{scan.what} {scan.file.label}: was listed, and does not exist any more: put it back, or "
                f"delete {self._dataset.uri}/{FOLDER} to list and scan the sources again"
            ) from error
        # If another task has scanned the same file meanwhile, its table has the same rows.
        self._dataset.put_new(key, path.read_bytes())
