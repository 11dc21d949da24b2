"""`dedupe.drop`: rows that another program found, by the ids in a parquet file."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.dataset.parts import PLAN_AGAIN
from data_prep.dataset.records import read_object
from data_prep.plan.listing import FOLDER, removed
from data_prep.sources.files import SourceFiles, raise_unless_content
from data_prep.sources.sample import RefusedError
from data_prep.store.store import Store
from model.common.errors import UserError, first_line
from model.common.records import STRICT, Hash, parse_record, seal

DROP_KEY = f"{FOLDER}/drop.json"
COLUMN = "id"
BATCH_ROWS = 1 << 16


class DropList(TypedDict):
    """`scan/drop.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    ids_xxh64: Hash
    """Hash of the ids in order, whatever the file's compression."""


def read_ids(path: str) -> Iterator[np.ndarray]:
    """Yield the ids of a drop list, int64 [N], some ten thousand at a time; -1 for a missing one.

    Raises:
        UserError: if the file does not exist or is damaged, or its column `id` is missing or not of integers.
    """
    try:
        files = SourceFiles(path, (".parquet",))
    except UserError as error:
        raise UserError(f"dedupe.drop: {error}") from error

    try:
        # Pre-buffering would load whole row groups.
        with files.open(path.rpartition("/")[2]) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            if COLUMN not in names:
                there = ", ".join(names)[:200]
                raise UserError(f"dedupe.drop: {path}: no column `{COLUMN}` (there are: {there}): rename one")
            kind = parquet.schema_arrow.field(COLUMN).type
            if not pa.types.is_integer(kind):
                raise UserError(
                    f"dedupe.drop: {path}: column `{COLUMN}` is {kind}: write the ids of the pairs, which "
                    "are int64"
                )
            for batch in parquet.iter_batches(BATCH_ROWS, columns=[COLUMN], use_threads=False):
                # Numbers beyond int64 become negative, which no row's id is.
                ids = batch.column(0).cast(pa.int64(), safe=False)
                yield ids.fill_null(-1).to_numpy(zero_copy_only=False)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"dedupe.drop: {path}: no such file: correct the path, or leave the key out"
        ) from error
    except RefusedError as error:
        raise UserError(f"dedupe.drop: {path}: {error.reason}: name a regular file") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise_unless_content(error)
        raise UserError(f"dedupe.drop: {path}: not a readable parquet file: {first_line(error)}") from error


def freeze_drop_list(path: str | None, dataset: Store) -> None:
    """Record which ids a drop list has, so that all tasks drop the same ones.

    Args:
        path: the drop list; None = none.
        dataset: the dataset's store.

    Raises:
        UserError: if the list cannot be read, or has changed since it was recorded.
    """
    if path is None:
        return
    digest = _hash_ids(path)
    dataset.put_new(DROP_KEY, seal({"ids_xxh64": digest}))
    _check(path, dataset, digest)


def frozen_ids(path: str, dataset: Store) -> Iterator[np.ndarray]:
    """Yield the ids of a drop list, int64 [N], and check that they are those recorded.

    Raises:
        UserError: if the list cannot be read, or has changed since it was recorded.
    """
    digest = xxhash.xxh64()
    for ids in read_ids(path):
        digest.update(ids.tobytes())
        yield ids
    _check(path, dataset, digest.hexdigest())


def look_for_other_ids(path: str | None, dataset: Store) -> None:
    """Check that the drop list of a finished plan has not changed; a plan needs the file no more.

    Raises:
        UserError: if it has other ids now.
    """
    if path is None:
        return
    try:
        digest = _hash_ids(path)
    except UserError as error:
        print(f"plan: cannot compare the ids with those of the plan: {error}")
        return
    # The record may have been deleted with the rest of the scan.
    if dataset.exists(DROP_KEY):
        _check(path, dataset, digest)


def _hash_ids(path: str) -> str:
    """Return the hash of the ids of a drop list."""
    digest = xxhash.xxh64()
    for ids in read_ids(path):
        digest.update(ids.tobytes())
    return digest.hexdigest()


def recorded_hash(dataset: Store) -> str:
    """Return the hash of the drop list's ids, as the plan recorded it.

    Raises:
        UserError: if the record was removed.
        StoreError: if it is damaged.
    """
    try:
        return read_object(
            dataset, DROP_KEY, lambda data: parse_record(DropList, data)["ids_xxh64"], PLAN_AGAIN
        )
    except FileNotFoundError as error:
        raise removed(dataset, DROP_KEY) from error


def _check(path: str, dataset: Store, digest: str) -> None:
    """Compare the hash of a drop list's ids with the one recorded."""
    if recorded_hash(dataset) != digest:
        raise UserError(
            f"dedupe.drop: {path} has other ids than when {dataset.uri} was planned: put the old file back, "
            "or give the dataset another `name`"
        )


def find_rows(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the row numbers, over all files, of sample ids; -1 for an id that no row has.

    Args:
        ids: int64 [N], any numbers.
        starts: the number of the first row of each file, and of all rows, int64 [files + 1].

    Returns:
        int64 [N].
    """
    files, rows = ids >> 32, ids & 0xFFFFFFFF
    known = (files >= 0) & (files < len(starts) - 1)
    # Other ids are looked up as those of file 0, and left out below.
    files = np.where(known, files, 0)
    ends = starts[np.minimum(files + 1, len(starts) - 1)]
    places = starts[files] + rows
    return np.where(known & (places < ends), places, -1)
