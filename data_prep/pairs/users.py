"""Number the users of a dataset's pairs, by a column of the sources."""

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_prep.config import DatasetConfig
from data_prep.dataset.parts import THREADS, committed
from data_prep.dataset.schema import PAIRS
from data_prep.dataset.users import UserIndex, ids_of_pairs, read_names, write_names
from data_prep.plan.captions import field_of
from data_prep.plan.listing import source_files
from data_prep.sources.source import OpenSources
from data_prep.store.store import Store
from model.common.errors import UserError


def run_users(config: DatasetConfig, dataset: Store) -> dict[int, int]:
    """Read the users of all pairs from the sources, and write names and index.

    Users that have a number keep it; new ones are numbered on, in the order of their names.

    Returns:
        User -> number of pairs.

    Raises:
        UserError: if the settings name no column, there are no pairs, or none has a user.
    """
    if not config.users.column:
        raise UserError("users.column is empty: name the column of the sources that says whose image it is")
    commits = [commit for commit in committed(dataset, PAIRS).values() if commit.rows]
    if not commits:
        raise UserError(f"{dataset.uri}: no pairs yet: run `python -m data_prep pairs` first")

    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda commit: ids_of_pairs(dataset, commit), commits)
        pairs = np.unique(np.concatenate(list(parts)))

    chosen = _chosen_users(config, dataset, set(pairs.tolist()))
    names = read_names(dataset)
    known = {name for name in names if name is not None}
    names += sorted(set(chosen.values()) - known)
    if not chosen:
        raise UserError(
            f"{dataset.uri}: no pair has a user in column `{config.users.column}`, or none has "
            f"users.min_images={config.users.min_images} of them: correct one"
        )

    # The names first: an index without them could not be read.
    write_names(dataset, names)
    numbers = {name: number for number, name in enumerate(names) if name is not None}
    ids = sorted(chosen)
    users = np.array([numbers[chosen[id]] for id in ids], dtype=np.int32)
    index = UserIndex(np.array(ids, dtype=np.int64), users)
    index.write(dataset)
    return index.counts


def _chosen_users(config: DatasetConfig, dataset: Store, pairs: set[int]) -> dict[int, str]:
    """Return sample id -> user for the pairs that count."""
    limits = config.users
    owners = {id: name for id, name in _read_users(config, dataset) if id in pairs}
    counts = Counter(owners.values())
    taken: Counter[str] = Counter()
    chosen: dict[int, str] = {}
    for id in sorted(owners):
        name = owners[id]
        if counts[name] < limits.min_images:
            continue

        taken[name] += 1
        if limits.max_images is None or taken[name] <= limits.max_images:
            chosen[id] = name
    return chosen


def _read_users(config: DatasetConfig, dataset: Store) -> Iterator[tuple[int, str]]:
    """Yield sample id and user of every row of the sources that has one."""
    files, column = source_files(dataset), config.users.column
    sources = OpenSources(config, files)

    for file in files:
        source, name = sources.open(file.number)
        rows = itertools.islice(source.read(name, [column]), config.sources[file.source].limit)
        for row, sample in enumerate(rows):
            user = field_of(sample.record, column)
            # Numbers are names too; what is empty or a list is none.
            if isinstance(user, str | int) and not isinstance(user, bool) and str(user).strip():
                yield file.number << 32 | row, str(user).strip()
