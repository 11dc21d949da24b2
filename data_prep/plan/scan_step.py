"""The step that scans the source files and the files of the evaluation sets, with one table per file.

Large files are scanned in pieces (`pieces`), each with a table of its own.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data_prep.config import DatasetConfig
from data_prep.engines import Do, Outcome, Step
from data_prep.plan.against import AGAINST_FOLDER, as_sources, evaluation_key
from data_prep.plan.listing import FOLDER, print_changed
from data_prep.plan.pieces import JoinStep, Piece, freeze_pieces
from data_prep.plan.scan import EVALUATION, SCAN, Scanner
from data_prep.plan.scan_tables import scan_key, write_scan
from data_prep.sources.source import Divisible, OpenSources, Source, SourceFile
from data_prep.store.store import Store
from model.common.errors import UserError

Span = tuple[int, int]
"""First row, and row behind the last."""


class _Unit(NamedTuple):
    """A file, or a piece of one."""

    table: str
    """Key of the table of the whole file."""
    sources: OpenSources
    file: SourceFile
    piece: Piece | None = None


class _Scan(NamedTuple):
    """The scan of one file, or of a piece of it."""

    schema: pa.Schema
    unit: _Unit
    what: str
    rows: Callable[[Source, SourceFile, Span | None], Iterator[pa.RecordBatch]]


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
        self._units: dict[str, _Unit] = {}
        self._add(self._pairs, FOLDER, scan_key)
        if evaluation:
            self._add(self._sets, AGAINST_FOLDER, evaluation_key)
        self.units = list(self._units)
        self.noun_of_units = "source files"
        if any(unit.piece for unit in self._units.values()):
            self.noun_of_units = "source files or pieces of them"

    def _add(self, sources: OpenSources, folder: str, table_key: Callable[[int], str]) -> None:
        """Add the units of some files."""
        pieces = freeze_pieces(sources, self._dataset, folder, table_key)
        for file in sources.files:
            table = table_key(file.number)
            for piece in pieces.get(file.number, [None]):
                self._units[piece.key if piece else table] = _Unit(table, sources, file, piece)

    def missing(self) -> list[str]:
        """Return the keys of the tables that are missing."""
        # One listing, because a request per file takes minutes where there are many.
        scanned = set(self._dataset.list(f"{FOLDER}/"))
        return [key for key in self.units if not scanned & {key, self._units[key].table}]

    def exists(self, unit: str) -> bool:
        """True if the file, or the piece of it, is scanned."""
        table = self._units[unit].table
        return self._dataset.exists(unit) or (table != unit and self._dataset.exists(table))

    def joining(self) -> JoinStep:
        """Return the step that joins the tables of pieces, once all are there."""
        pieces: dict[str, list[Piece]] = defaultdict(list)
        files: dict[str, tuple[SourceFile, pa.Schema, Sequence[Piece]]] = {}
        for unit in self._units.values():
            if unit.piece is not None:
                pieces[unit.table].append(unit.piece)
                schema = SCAN if unit.sources is self._pairs else EVALUATION
                files[unit.table] = unit.file, schema, pieces[unit.table]
        return JoinStep(self._dataset, files)

    def total(self, units: object) -> None:
        """Return None: only the scan shows how many rows the files have."""
        return

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Start the processes that inspect images."""
        with Scanner(self._config) as scanner, tempfile.TemporaryDirectory() as folder:

            def hash_images(source: Source, file: SourceFile, span: Span | None) -> Iterator[pa.RecordBatch]:
                return scanner.hash_images(source, file, self._settings.sources[file.source].limit, span)

            def do(keys: Sequence[str]) -> Iterator[Outcome]:
                for key in keys:
                    unit = self._units[key]
                    if unit.sources is self._pairs:
                        scan = _Scan(SCAN, unit, "source file", scanner.scan)
                    else:
                        scan = _Scan(EVALUATION, unit, "evaluation file", hash_images)
                    yield from self._commit(scan, Path(folder) / "scan.parquet")

            yield do

    def print_changed(self, keys: Sequence[str]) -> None:
        """Print how many of some files, which were scanned now, have changed since they were listed."""
        for sources in (self._pairs, self._sets):
            own = {
                unit.file.number for unit in map(self._units.get, keys) if unit and unit.sources is sources
            }
            print_changed("plan", sources.changed(own))

    def _commit(self, scan: _Scan, path: Path) -> Iterator[Outcome]:
        """Scan one file, or a piece of it, into a temporary table at `path`, and commit it."""
        unit = scan.unit
        source, name = unit.sources.open(unit.file.number)
        piece = unit.piece
        key, span = unit.table, None
        # A file that has changed since it was cut is scanned whole: other tasks may see other rows of it.
        if (
            piece is not None
            and isinstance(source, Divisible)
            and source.fingerprint(name) == piece.fingerprint
        ):
            key, span = piece.key, (piece.start, piece.end)
        rows = 0
        try:
            batches = scan.rows(source, unit.file, span)
            for counts in write_scan(path, scan.schema, unit.file, batches, span[0] if span else 0):
                rows += counts.total()
                yield Outcome(counts)
        except FileNotFoundError as error:
            raise UserError(
                f"{scan.what} {unit.file.label}: was listed, and does not exist any more: put it back, or "
                f"delete {self._dataset.uri}/{FOLDER} to list and scan the sources again"
            ) from error
        if span is not None and rows != span[1] - span[0]:
            yield from self._commit(scan._replace(unit=unit._replace(piece=None)), path)
            return
        # If another task has scanned the same file meanwhile, its table has the same rows.
        self._dataset.put_new(key, path.read_bytes())
