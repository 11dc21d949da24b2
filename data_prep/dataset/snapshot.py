"""Snapshots of a dataset: the parts that exist in all families, frozen for training runs to read."""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow
import pyarrow.parquet
import xxhash

from data_prep.dataset.accounts import Totals, account, without_counts
from data_prep.dataset.parts import (
    PLAN_KEY,
    array_list,
    committed,
    read_plan,
)
from data_prep.dataset.schema import (
    PAIRS,
    BucketRecord,
    Commit,
    Family,
    Manifest,
    Part,
    Snapshot,
)
from data_prep.dataset.snapshot_families import choose_families, common_caption_kinds
from data_prep.dataset.snapshot_reader import (
    HISTORY,
    last_taken,
    missing_payloads,
)
from data_prep.dataset.users import users_of_parts
from data_prep.store.store import Store, StoredFile, StoreError
from model.common.errors import UserError
from model.common.records import canonical_json, seal
from model.common.share import Share

MAX_TASKS = 1000
"""Slurm's default MaxArraySize allows task numbers up to this."""

REPAIR = "delete this commit and run the job again"

Commits = dict[str, dict[Part, Commit]]
"""Kind -> part -> commit."""

IndexRow = dict[str, str | int | list[int]]
"""A row of a bucket's index, see `Snapshot`."""


def take_snapshot(dataset: Store, families: Sequence[str] | None = None, partial: bool = False) -> Snapshot:
    """Freeze the parts that exist in the pairs and in every family, for training runs to read.

    The same content gives the same id (see `Snapshot`), and taking it again only makes it `latest`. The
    indexes are written first, then the record, then its entry in the history, each atomically: a kill at any
    point leaves no snapshot or a complete one. Only one thing is ever replaced: the record of a snapshot
    whose parts were committed again with the same bytes under other keys (after a repair). Its old indexes
    stay, for runs that read them.

    Args:
        dataset: the dataset's store.
        families: names of the families; None = all that are registered but captions families, whose captions
            are in the text families that read them.
        partial: leave incomplete parts out instead of refusing.

    Returns:
        The snapshot, which is `latest` now.

    Raises:
        UserError: if there is no plan or no such family, if parts are missing (the message has the tasks to
            repeat), if families do not fit together, or if no rows are left.
    """
    plan = read_plan(dataset)
    chosen = choose_families(dataset, families)

    # Without their counts, which take most of the memory.
    totals = Totals()
    commits = {PAIRS: committed(dataset, PAIRS, totals.take)}
    for name in sorted(chosen):
        commits[name] = committed(dataset, name, without_counts)
    _check_alignment(dataset, plan, commits, chosen)
    # Tasks of `pairs` check the counts of their own parts only. A dataset that was put together by hand may
    # have no counts.
    if totals.counts and dataset.exists(PLAN_KEY):
        account(dataset, commits[PAIRS], totals)

    missing: dict[str, list[Part]] = {}
    for kind, parts in commits.items():
        missing[kind] = [part for part in plan.parts if part not in parts]
    if any(missing.values()) and not partial:
        raise UserError(_how_to_complete(dataset, plan, missing))

    # All families of a part share its rows, so a part that one family lacks is left out of all.
    incomplete: set[Part] = set().union(*missing.values())
    complete = [part for part in plan.parts if part not in incomplete]
    # A part whose images were all damaged is complete, but has no shard to read.
    with_rows = [part for part in complete if commits[PAIRS][part].rows]
    if not with_rows:
        raise UserError(f"{dataset.uri}: no part has rows in {', '.join(commits)}: nothing to train on")

    _check_payloads(dataset, commits, chosen, with_rows)
    buckets: dict[str, BucketRecord] = {}
    indexes: dict[str, bytes] = {}
    users = users_of_parts(dataset, commits[PAIRS], with_rows)
    for bucket in sorted({part.bucket for part in with_rows}):
        parts = [part for part in with_rows if part.bucket == bucket]
        buckets[bucket], indexes[bucket] = _index_bucket(parts, commits, chosen, users)

    left_out = _left_out(plan, commits)
    kinds = common_caption_kinds(dataset, plan, chosen)
    snapshot = Snapshot(plan.dataset, kinds, chosen, buckets, left_out)
    _publish(dataset, snapshot, indexes)
    return snapshot


def _check_alignment(dataset: Store, plan: Manifest, commits: Commits, families: dict[str, Family]) -> None:
    """Raise `UserError` if a part is not in the plan, or a family's part does not belong to the pairs."""
    planned = set(plan.parts)
    for kind, parts in commits.items():
        family_hash = "" if kind == PAIRS else families[kind].hash
        for part, commit in parts.items():
            wrong = ""
            pairs = commits[PAIRS].get(part)
            if part not in planned:
                wrong = "the plan has no such part: use another dataset name for a new plan"
            elif kind == PAIRS:
                continue
            elif pairs is None or (pairs.rows, pairs.ids_xxh64) != (commit.rows, commit.ids_xxh64):
                wrong = f"holds other samples than the pairs of this part: {REPAIR}"
            # A part without rows has no file, any other exactly one.
            elif commit.family_hash != family_hash or len(commit.files) != (commit.rows > 0):
                wrong = f"was not made by family `{kind}` as registered: {REPAIR}"
            if wrong:
                raise UserError(f"{dataset.uri}/{part.commit_key(kind)}: {wrong}")


def _check_payloads(dataset: Store, commits: Commits, families: Iterable[str], parts: Sequence[Part]) -> None:
    """Raise `StoreError` if a file that the snapshot would name is not in the store."""
    for kind in families:
        owners = {file.key: part for part in parts for file in commits[kind][part].files}
        missing = missing_payloads(dataset, kind, owners)
        if missing:
            key = f"{dataset.uri}/{owners[missing[0]].commit_key(kind)}"
            raise StoreError(f"{key}: {missing[0]} is missing, one of {len(missing)} such files: {REPAIR}")


def _how_to_complete(dataset: Store, plan: Manifest, missing: dict[str, list[Part]]) -> str:
    """Name the tasks to run again, as ready `--array=` lists: tasks share the plan's parts by `Share`."""
    tasks = min(len(plan.parts), MAX_TASKS)
    position = {part: number for number, part in enumerate(plan.parts)}
    hints = []
    for kind, parts in missing.items():
        if parts:
            script = "pairs.sh" if kind == PAIRS else "encode.sh"
            array = array_list({Share.owner(position[part], len(position), tasks) for part in parts})
            # A sparse array does not show how many tasks share the work, see `Share`.
            command = f"LI_DIT_TASKS={tasks} sbatch --array={array} cluster/{script}"
            hints.append(f"{kind}: {len(parts)} of {len(plan.parts)}: `{command}`")
    return f"{dataset.uri}: parts are missing; run again, or take a partial snapshot. " + "; ".join(hints)


def _index_bucket(
    parts: list[Part], commits: Commits, families: Iterable[str], users: dict[Part, list[int]] | None
) -> tuple[BucketRecord, bytes]:
    """Return the snapshot's record of one bucket, and its index as parquet."""
    rows = [_index_row(part, commits, families) for part in parts]
    # Datasets without users have no such column, and so the snapshots that they always had.
    if users is not None:
        for row, part in zip(rows, parts, strict=True):
            row["users"] = users[part]
    data = _parquet(rows)
    record: BucketRecord = {
        "parts": len(rows),
        "rows": sum(commits[PAIRS][part].rows for part in parts),
        "content": _content_hash(rows),
        "index_xxh64": xxhash.xxh64_hexdigest(data),
    }
    return record, data


def _index_row(part: Part, commits: Commits, families: Iterable[str]) -> IndexRow:
    pairs = commits[PAIRS][part]
    row: IndexRow = {"number": part.number, "rows": pairs.rows, "ids_xxh64": pairs.ids_xxh64}
    for family in sorted(families):
        # `_check_alignment` has made sure that there is just one.
        (file,) = commits[family][part].files
        row |= {f"{family}.key": file.key, f"{family}.bytes": file.bytes, f"{family}.xxh64": file.xxh64}
    return row


def _content_hash(rows: list[IndexRow]) -> str:
    """Return the SHA-256 of the index without keys, which contain the attempt's random name."""
    digest = hashlib.sha256()
    for row in rows:
        content = {name: value for name, value in row.items() if not name.endswith(".key")}
        digest.update(canonical_json(content) + b"\n")
    return digest.hexdigest()


def _parquet(rows: list[IndexRow]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


def _left_out(plan: Manifest, commits: Commits) -> dict[str, int]:
    """Count the plan's rows that the snapshot lacks, by the first kind in which their part is missing."""
    left_out: Counter[str] = Counter()
    for part in plan.parts:
        absent = [kind for kind, parts in commits.items() if part not in parts]
        if absent:
            pairs = commits[PAIRS].get(part)
            planned = plan.buckets[part.bucket][part.number]
            left_out[f"no {absent[0]} yet"] += pairs.rows if pairs else planned
    return dict(left_out)


def _publish(dataset: Store, snapshot: Snapshot, indexes: dict[str, bytes]) -> None:
    """Write indexes, record and history entry, in this order."""
    for bucket, data in indexes.items():
        dataset.put_new(snapshot.index_key(bucket), data)

    # A record that differs has the same content under other keys: parts were committed again after a repair.
    record = snapshot.to_json()
    if not dataset.put_new(snapshot.key, record) and dataset.read(snapshot.key) != record:
        dataset.put(snapshot.key, record)

    # Another task may take the same number in the history at the same moment: then try the next one.
    while True:
        last = last_taken(dataset)
        # Taken again without a change, or by another task just now: no second entry.
        if last is not None and last[1] == snapshot.id:
            return
        number = 0 if last is None else last[0] + 1
        entry = {"id": snapshot.id, "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        if dataset.put_new(f"{HISTORY}{number:06d}.json", seal(entry)):
            return


def snapshot_ids(dataset: Store) -> list[str]:
    """Return the ids of all snapshots."""
    return [
        name for name in dataset.folders("snapshots/") if dataset.exists(f"snapshots/{name}/snapshot.json")
    ]


def index_files(index: pyarrow.Table, families: Iterable[str]) -> list[StoredFile]:
    """Return the payload files that a bucket's index names."""
    files = []
    for row in index.to_pylist():
        for name in families:
            files.append(StoredFile(row[f"{name}.key"], row[f"{name}.bytes"], row[f"{name}.xxh64"]))
    return files
