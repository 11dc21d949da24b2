"""Pieces of large source files: tasks scan them one by one, and join their tables to that of the file.

A table of paths, or a folder with a metadata file, may have millions of rows. They are cut once for all tasks
into pieces, which are units of the scan: tasks share them, and one that is killed repeats at most one. The
joined table has the same bytes as if one task had scanned the whole file, so nothing else knows of pieces.
"""

import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import PLAN_AGAIN
from data_prep.dataset.records import read_object
from data_prep.engines import Do, Outcome, Step
from data_prep.plan.against import AGAINST_FOLDER
from data_prep.plan.listing import FOLDER, removed
from data_prep.plan.scan_tables import read_scan, write_scan
from data_prep.sources.files import READ_AHEAD
from data_prep.sources.source import Divisible, OpenSources, SourceFile, may_be_cut
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.records import STRICT, Count, parse_record, seal

PIECE_ROWS = 1 << 16
"""Rows of a piece: some minutes of a task that reads each image from a bucket."""
MAX_LOOKED_AT = 1 << 14
"""Source files, the largest ones, of which the rows are counted before the scan: a request or two each."""


class CutFile(TypedDict):
    """A file in pieces."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    number: Count
    fingerprint: str
    """Fingerprint of the file when it was cut."""
    ends: list[Count]
    """Row behind each piece."""


class CutList(TypedDict):
    """`scan/cuts.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    files: list[CutFile]


class Piece(NamedTuple):
    """Some rows of a file."""

    key: str
    """Key of its table."""
    start: int
    end: int
    fingerprint: str


def freeze_pieces(
    sources: OpenSources, dataset: Store, folder: str, table_key: Callable[[int], str]
) -> dict[int, list[Piece]]:
    """Cut the large files among some into pieces, once for all tasks.

    Args:
        sources: the files, as they were listed.
        dataset: the dataset's store.
        folder: folder of their list.
        table_key: returns the key of the table of a file; one that is there is not cut any more.

    Returns:
        The pieces of each file that has several, by its number.
    """
    if not any(may_be_cut(settings) for settings in sources.config.sources):
        return {}
    key = f"{folder}/cuts.json"
    if not dataset.exists(key):
        # Of an earlier version, some may be scanned.
        present = set(dataset.list(f"{folder}/"))
        files = [file for file in sources.files if table_key(file.number) not in present]
        dataset.put_new(key, seal({"files": list(_cut(sources, files))}))
    try:
        record = read_object(dataset, key, lambda data: parse_record(CutList, data), PLAN_AGAIN)
    except FileNotFoundError as error:
        raise removed(dataset, key) from error

    pieces: dict[int, list[Piece]] = {}
    for file in record["files"]:
        spans = enumerate(itertools.pairwise([0, *file["ends"]]))
        pieces[file["number"]] = [
            Piece(f"{folder}/pieces/{file['number']:08d}/{number:06d}.parquet", *span, file["fingerprint"])
            for number, span in spans
        ]
    return pieces


def _cut(sources: OpenSources, files: Collection[SourceFile]) -> Iterator[CutFile]:
    """Yield the files that have several pieces."""
    files = [file for file in files if may_be_cut(sources.config.sources[file.source])]
    divisible = [file for file in files if isinstance(sources.open(file.number)[0], Divisible)]
    largest = sorted(divisible, key=_size, reverse=True)[:MAX_LOOKED_AT]
    # The first one alone: with it, a source lists its files for all others.
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        cuts = itertools.chain(
            (_cut_file(sources, file) for file in largest[:1]),
            pool.map(lambda file: _cut_file(sources, file), largest[1:]),
        )
        yield from sorted(filter(None, cuts), key=lambda cut: cut["number"])


def _size(file: SourceFile) -> int:
    """Return the size of a file, or the number of files of a folder, as its version begins with it."""
    match = re.match(r"\d+", file.version)
    return int(match[0]) if match else 0


def _cut_file(sources: OpenSources, file: SourceFile) -> CutFile | None:
    source, name = sources.open(file.number)
    assert isinstance(source, Divisible), "was chosen by that"
    try:
        ends = source.cuts(name, PIECE_ROWS)
    except FileNotFoundError:
        return None  # the scan says so
    limit = sources.config.sources[file.source].limit
    if limit is not None:
        ends = sorted({min(end, limit) for end in ends})
    if len(ends) < 2:
        return None
    return CutFile(number=file.number, fingerprint=source.fingerprint(name), ends=ends)


class JoinStep(Step):
    """The joining of the tables of all pieces; its units are the keys of the files' tables."""

    title = "scan, joined"
    helps = True

    def __init__(
        self, dataset: Store, files: dict[str, tuple[SourceFile, pa.Schema, Sequence[Piece]]]
    ) -> None:
        """Join nothing yet.

        Args:
            dataset: the dataset's store.
            files: by the key of its table, each file with the columns of its table and its pieces, which are
                scanned.
        """
        self.units = list(files)
        self._dataset = dataset
        self._files = files

    def missing(self) -> list[str]:
        """Return the keys of the tables that are missing."""
        present = set(self._dataset.list(f"{FOLDER}/"))
        return [key for key in self.units if key not in present]

    def exists(self, unit: str) -> bool:
        """True if the file's table is there."""
        return self._dataset.exists(unit)

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Open a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="li-dit-plan-") as folder:

            def do(keys: Sequence[str]) -> Iterator[Outcome]:
                for key in keys:
                    self._join(key, Path(folder) / "scan.parquet")
                    yield Outcome(Counter({"": 1}))

            yield do

    def _join(self, key: str, path: Path) -> None:
        file, schema, pieces = self._files[key]
        try:
            batches = (batch for piece in pieces for batch in self._batches(piece, schema))
            for _ in write_scan(path, schema, file, batches):
                pass
        except UserError:
            # Another task has joined them, and finished the plan.
            if self._dataset.exists(key):
                return
            raise
        self._dataset.put_new(key, path.read_bytes())

    def _batches(self, piece: Piece, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for table in read_scan(self._dataset, piece.key, schema):
            yield from table.to_batches()


def remove_pieces(config: DatasetConfig, dataset: Store) -> None:
    """Remove the tables of all pieces, which a plan that exists does not need."""
    for folder, sources in ((FOLDER, config.sources), (AGAINST_FOLDER, config.dedupe.against or [])):
        if any(map(may_be_cut, sources)):
            dataset.delete_many(list(dataset.list(f"{folder}/pieces/")))
