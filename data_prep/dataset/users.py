"""Users of a dataset: their names in one object, and which sample is whose in another, by number.

<store>/<dataset>/users/
  names.json       name of each user, in the order of their numbers; null = deleted
  index.parquet    sample id and number of its user, for samples that have one

Numbers are dense and never given to another user. Everything else (snapshots, batches, weights) has numbers
alone, so without `names.json` nothing in the store names a user.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from data_prep.dataset.parts import THREADS
from data_prep.dataset.records import parse_table, read_object
from data_prep.dataset.schema import TABLE, Commit, Part
from data_prep.store.store import Store
from model.common.errors import UserError
from model.common.records import STRICT, parse_record, seal

NAMES_KEY, INDEX_KEY = "users/names.json", "users/index.parquet"
NOBODY = -1
INDEX = pa.schema([("id", pa.int64()), ("user", pa.int32())])
AGAIN = "bring it back from a copy, or run `python -m data_prep users` again"


class NamesRecord(TypedDict):
    """`users/names.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    names: list[str | None]


def read_names(dataset: Store) -> list[str | None]:
    """Return the names by number, None for users that were deleted; empty if the object is not there.

    Raises:
        StoreError: if it is damaged.
    """
    try:
        record = read_object(dataset, NAMES_KEY, lambda data: parse_record(NamesRecord, data), AGAIN)
    except FileNotFoundError:
        return []
    return list(record["names"])


def write_names(dataset: Store, names: list[str | None]) -> None:
    """Write the names; those of deleted users are in no object then."""
    dataset.put(NAMES_KEY, seal({"names": names}))


def find_user(dataset: Store, name: str) -> int:
    """Return the number of a user.

    Raises:
        UserError: if nobody has that name.
    """
    names = read_names(dataset)
    if name not in names:
        known = f"{sum(other is not None for other in names)} names" if names else "no names"
        raise UserError(f"{dataset.uri}/{NAMES_KEY}: no user `{name}` among {known}: correct the name")
    return names.index(name)


class UserIndex:
    """The number of each sample's user."""

    def __init__(self, ids: NDArray[np.int64], users: NDArray[np.int32]) -> None:
        """Keep the index; `ids` are sorted."""
        self._ids, self._users = ids, users

    @classmethod
    def read(cls, dataset: Store) -> "UserIndex | None":
        """Read the index of a dataset; None if it has no users.

        Raises:
            StoreError: if it is damaged.
        """

        def parse(data: bytes) -> pa.Table:
            return parse_table(data, INDEX)

        try:
            table: Any = read_object(dataset, INDEX_KEY, parse, AGAIN)
        except FileNotFoundError:
            return None
        return cls(table["id"].to_numpy(), table["user"].to_numpy())

    def write(self, dataset: Store) -> None:
        """Write the index in place of the one that the dataset has."""
        sink = pa.BufferOutputStream()
        table = pa.table({"id": self._ids, "user": self._users}, schema=INDEX)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        dataset.put(INDEX_KEY, sink.getvalue().to_pybytes())

    def users_of(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the user of each sample; `NOBODY` if it has none."""
        if not len(self._ids):
            return np.full(len(ids), NOBODY, np.int32)
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[places] == ids, self._users[places], NOBODY).astype(np.int32)

    def without(self, user: int) -> "UserIndex":
        """Return the index without the samples of a user."""
        others = self._users != user
        return UserIndex(self._ids[others], self._users[others])

    @property
    def counts(self) -> dict[int, int]:
        """User -> number of samples."""
        users, counts = np.unique(self._users, return_counts=True)
        return dict(zip(users.tolist(), counts.tolist(), strict=True))


def ids_of_pairs(dataset: Store, commit: Commit) -> NDArray[np.int64]:
    """Return the sample ids of one part of the pairs, in order.

    Raises:
        StoreError: if its table is missing or damaged.
    """
    (table,) = [file for file in commit.files if file.key.endswith(f"/{TABLE}")]
    way_out = "run `python -m data_prep verify`"
    rows = read_object(dataset, table.key, lambda data: parse_table(data, columns=["id"]), way_out)
    return rows["id"].to_numpy()


def users_of_parts(
    dataset: Store, pairs: Mapping[Part, Commit], parts: Sequence[Part]
) -> dict[Part, list[int]] | None:
    """Return the number of each row's user, by part; None if the dataset has no users."""
    index = UserIndex.read(dataset)
    if index is None:
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        ids = pool.map(lambda part: ids_of_pairs(dataset, pairs[part]), parts)
        return {part: index.users_of(own).tolist() for part, own in zip(parts, ids, strict=True)}


def forget_user(dataset: Store, name: str) -> int:
    """Remove a user's name and index entries, and return the number, which nobody gets again.

    Snapshots that were taken before still know which samples belong to one user, under its number.

    Raises:
        UserError: if nobody has that name.
    """
    number = find_user(dataset, name)
    # The index first: after a kill in between, the name is still there, and the command can be repeated.
    index = UserIndex.read(dataset)
    if index is not None:
        index.without(number).write(dataset)

    names = read_names(dataset)
    names[number] = None
    write_names(dataset, names)
    return number
