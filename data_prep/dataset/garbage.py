"""Garbage: objects that killed or losing writers left behind.

A writer may commit an attempt at the moment in which its payload is collected. Both sides therefore write
first and look second: the collector claims the attempt with an object beside the payload and then looks for
its commit; the writer commits and then looks for a claim, and for its payload (`commit_part`). At least one
of them sees the other, whatever their clocks say, so no commit ever names a file that was collected.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data_prep.dataset.accounts import without_counts
from data_prep.dataset.parts import THREADS, committed, read_commit
from data_prep.dataset.schema import CLAIM, PAIRS, Part
from data_prep.dataset.snapshot import index_files, snapshot_ids
from data_prep.dataset.snapshot_reader import read_families, read_index_file
from data_prep.store.store import Store, StoredFile, is_plain_key

# Keys of objects that may be garbage. Plans, commits and records match none of these patterns, so they are
# never removed.
ATTEMPT = re.compile(
    r"(?:pairs|families/(?P<family>[^/]+))/(?P<bucket>[^/]+)/(?P<number>\d{5,})/[0-9a-f]{16}"
)
CONSTANTS = re.compile(r"families/[^/]+/constants-[0-9a-f]{16}\.safetensors")
ROLLUP = re.compile(r"rollups/[^/]+/[0-9a-f]{16}\.parquet")
INDEX = re.compile(r"(snapshots/[0-9a-f]{16})/[^/]+-([0-9a-f]{16})\.parquet")

GROUPS_AT_ONCE = 512
"""Attempts that are claimed before their objects are removed, by few requests."""


def collect_garbage(dataset: Store, older_than_hours: float = 24, delete: bool = False) -> list[str]:
    """Find objects that killed or losing writers left behind, and remove them if asked.

    Garbage is: payloads, constants and indexes that no commit, family or snapshot names, temporary files, and
    roll-ups whose commits have changed or are in larger ones; and only if the whole attempt is older than the
    limit, by the store's own clock. Candidates are listed before the commits are read, so whatever is
    committed meanwhile is safe. The limit protects writers that have not committed yet, so it should exceed
    the time that a task takes from its first upload to its commit (seconds, or the retry time if the store
    fails): a writer that is overtaken has to do its part again.

    Args:
        dataset: the dataset's store.
        older_than_hours: age below which nothing is garbage.
        delete: remove the garbage.

    Returns:
        The keys that are garbage, now removed if `delete`.

    Raises:
        StoreError: if a commit or an index cannot be read. Nothing is removed then, because that object may
            name any of the candidates.
    """
    before = dataset.now() - 3600 * older_than_hours
    groups: dict[str, list[str]] = defaultdict(list)
    newest: dict[str, float] = defaultdict(float)
    for key, modified in dataset.entries(""):
        group = _garbage_group(key)
        if group:
            groups[group].append(key)
            # The newest object counts: a slow writer's first files may be old long before it commits.
            newest[group] = max(newest[group], modified)

    # Only now, so that a commit that was made since the listing protects its payload.
    live = _live_groups(dataset)
    garbage = {group: keys for group, keys in groups.items() if group not in live and newest[group] < before}
    if not delete:
        return sorted(key for keys in garbage.values() for key in keys)

    removed: list[str] = []
    names = list(garbage)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), GROUPS_AT_ONCE):
            some = names[start : start + GROUPS_AT_ONCE]
            claimed = pool.map(lambda group: _claim(dataset, group), some)
            groups_left = [group for group, is_ours in zip(some, claimed, strict=True) if is_ours]
            keys = [key for group in groups_left for key in garbage[group]]
            dataset.delete_many(keys)
            # The claims last: a writer that finds none has to find its payload.
            dataset.delete_many(f"{group}/{CLAIM}" for group in groups_left if ATTEMPT.fullmatch(group))
            removed += keys
    return sorted(removed)


def _claim(dataset: Store, group: str) -> bool:
    """Claim a group's objects for removal; False if its attempt was committed meanwhile."""
    attempt = ATTEMPT.fullmatch(group)
    if attempt:
        claim = f"{group}/{CLAIM}"
        dataset.put(claim, b"")
        kind = attempt["family"] or PAIRS
        if _is_committed(dataset, kind, Part(attempt["bucket"], int(attempt["number"])), group):
            dataset.delete(claim)
            return False
    return True


def _is_committed(dataset: Store, kind: str, part: Part, group: str) -> bool:
    try:
        commit = read_commit(dataset, kind, part)
    except FileNotFoundError:
        return False
    return part.payload_key(kind, commit.attempt, "").rstrip("/") == group


def _garbage_group(key: str) -> str | None:
    """Return the unit of removal of an object: its attempt's folder, or itself; None = never garbage."""
    # In a store that others can write to, a name may be one that no writer of ours gives.
    if not is_plain_key(key):
        return None
    folder, _, name = key.rpartition("/")
    # A temporary file or probe of a writer that was killed.
    if name.startswith("."):
        return key
    if ATTEMPT.fullmatch(folder):
        return folder
    return key if any(pattern.fullmatch(key) for pattern in (CONSTANTS, INDEX, ROLLUP)) else None


def _live_groups(dataset: Store) -> set[str]:
    """Return the groups that a commit, a family or a snapshot names, and the roll-ups that are of use.

    Indexes of older records of a snapshot count as named, because runs may still read them (see
    `take_snapshot`).
    """
    # Of each file only its group is kept, since a billion pairs have millions of files.
    live: set[str] = set()
    for kind in dataset.folders("commits/"):
        for commit in committed(dataset, kind, without_counts, rollups_used=live).values():
            live.update(_groups_of(commit.files))

    live.update(family.constants_key for family in read_families(dataset).values())
    snapshots = {f"snapshots/{id}" for id in snapshot_ids(dataset)}
    for key in dataset.list("snapshots/"):
        index = INDEX.fullmatch(key)
        # A writer that was killed before its record leaves indexes that no run can find.
        if not index or index[1] not in snapshots:
            continue
        live.add(key)

        table = read_index_file(dataset, key, index[2])
        names = [column.removesuffix(".key") for column in table.column_names if column.endswith(".key")]
        live.update(_groups_of(index_files(table, names)))
    return live


def _groups_of(files: Iterable[StoredFile]) -> Iterator[str]:
    """Yield the groups of files that a commit or an index names."""
    return (file.key.rpartition("/")[0] for file in files)
