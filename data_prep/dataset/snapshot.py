"""Snapshots of a dataset: taking one, verifying what the commits name, removing what none names."""

import hashlib
import io
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import xxhash

from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import THREADS, array_list, committed, committed_parts, hash_ids, read_commit, read_plan
from data_prep.dataset.schema import PAIRS, TABLE, Commit, Family, Manifest, Part, Snapshot, canonical_json
from data_prep.dataset.snapshot_reader import HISTORY, last_taken, read_families, read_family, read_index, read_snapshot
from data_prep.store.store import Store, StoredFile, StoreError
from model.common.errors import UserError
from model.common.share import Share

MAX_TASKS = 1000
"""Slurm's default MaxArraySize allows task numbers up to this."""

REPAIR = "delete this commit and run the job again"

Commits = dict[str, dict[Part, Commit]]
"""Kind -> part -> commit."""


def take_snapshot(dataset: Store, families: Sequence[str] | None = None, partial: bool = False) -> Snapshot:
    """Freeze the parts that exist in the pairs and in every family, for training runs to read.

    The same content gives the same id (see `Snapshot`), and taking it again changes nothing but that it is `latest` now. The
    indexes are written first, then the record, then its entry in the history, each whole or not at all: killed anywhere, it
    leaves no snapshot or a complete one. Only one thing is ever replaced: the record of a snapshot whose parts were
    committed anew with the same bytes under other keys (after a repair); its old indexes stay, for runs that read them.

    Args:
        dataset: the dataset's store.
        families: names of the families; None = all that are registered.
        partial: leave incomplete parts out instead of refusing.

    Raises:
        UserError: no plan, no such family, parts are missing (with the tasks to repeat), families do not fit together, or
            nothing is left.
    """
    plan = read_plan(dataset)
    chosen = {name: read_family(dataset, name) for name in families} if families else read_families(dataset)
    if not chosen:
        raise UserError(f"{dataset.uri}: no families: run `python -m data_prep latents` and `text` first")
    commits = {kind: committed(dataset, kind) for kind in [PAIRS, *sorted(chosen)]}
    _check_alignment(dataset, plan, commits, chosen)
    missing = {kind: [part for part in plan.parts if part not in there] for kind, there in commits.items()}
    if any(missing.values()) and not partial:
        raise UserError(_how_to_complete(dataset, plan, missing))
    parts = [part for part in plan.parts if all(part in there for there in commits.values())]
    whole = [part for part in parts if commits[PAIRS][part].rows]
    if not whole:
        raise UserError(f"{dataset.uri}: no part has rows in {', '.join(commits)}: nothing to train on")
    indexes, buckets = {}, {}
    for bucket in sorted({part.bucket for part in whole}):
        rows = [_index_row(part, commits, chosen) for part in whole if part.bucket == bucket]
        data = _parquet(rows)
        buckets[bucket] = {
            "parts": len(rows),
            "rows": sum(commits[PAIRS][part].rows for part in whole if part.bucket == bucket),
            "content": _content_hash(rows),
            "index_xxh64": xxhash.xxh64_hexdigest(data),
        }
        indexes[bucket] = data
    left_out = _left_out(plan, commits)
    snapshot = Snapshot(plan.dataset, plan.caption_kinds, chosen, buckets, left_out)
    _publish(dataset, snapshot, indexes)
    return snapshot


def _check_alignment(dataset: Store, plan: Manifest, commits: Commits, families: dict[str, Family]) -> None:
    planned = set(plan.parts)
    for kind, there in commits.items():
        for part, commit in there.items():
            key = f"{dataset.uri}/{part.commit_key(kind)}"
            if part not in planned:
                raise UserError(f"{key}: the plan has no such part: use another dataset name for a new plan")
            if kind == PAIRS:
                continue
            pairs = commits[PAIRS].get(part)
            if pairs is None or (pairs.rows, pairs.ids_xxh64) != (commit.rows, commit.ids_xxh64):
                raise UserError(f"{key}: holds other samples than the pairs of this part: {REPAIR}")
            if commit.family_hash != families[kind].hash or len(commit.files) != (commit.rows > 0):
                raise UserError(f"{key}: was not made by family `{kind}` as registered: {REPAIR}")


def _how_to_complete(dataset: Store, plan: Manifest, missing: dict[str, list[Part]]) -> str:
    """Which tasks to run again, as ready `--array=` lists: tasks share the plan's parts by `Share`."""
    tasks = min(len(plan.parts), MAX_TASKS)
    order = {part: number for number, part in enumerate(plan.parts)}
    lines = []
    for kind, parts in missing.items():
        if parts:
            script = "shard.sh" if kind == PAIRS else "encode.sh"
            array = array_list({Share.owner(order[part], len(order), tasks) for part in parts})
            lines.append(
                f"{kind}: {len(parts)} of {len(plan.parts)}: `LI_DIT_TASKS={tasks} sbatch --array={array} cluster/{script}`"
            )
    return f"{dataset.uri}: parts are missing; run again, or take a partial snapshot. " + "; ".join(lines)


def _index_row(part: Part, commits: Commits, families: Iterable[str]) -> dict[str, str | int]:
    pairs = commits[PAIRS][part]
    row: dict[str, str | int] = {"number": part.number, "rows": pairs.rows, "ids_xxh64": pairs.ids_xxh64}
    for family in sorted(families):
        (file,) = commits[family][part].files
        row |= {f"{family}.key": file.key, f"{family}.bytes": file.bytes, f"{family}.xxh64": file.xxh64}
    return row


def _content_hash(rows: list[dict[str, str | int]]) -> str:
    """SHA-256 over the index without the keys: the attempt's random name in a key says nothing about what was read."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json({name: value for name, value in row.items() if not name.endswith(".key")}) + b"\n")
    return digest.hexdigest()


def _parquet(rows: list[dict[str, str | int]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


def _left_out(plan: Manifest, commits: Commits) -> dict[str, int]:
    left_out: Counter[str] = Counter()
    for part in plan.parts:
        absent = [kind for kind, there in commits.items() if part not in there]
        if absent:
            pairs = commits[PAIRS].get(part)
            left_out[f"no {absent[0]} yet"] += pairs.rows if pairs else plan.buckets[part.bucket][part.number]
    return dict(left_out)


def _publish(dataset: Store, snapshot: Snapshot, indexes: dict[str, bytes]) -> None:
    for bucket, data in indexes.items():
        dataset.put_new(snapshot.index_key(bucket), data)
    if not dataset.put_new(snapshot.key, snapshot.to_json()) and dataset.read(snapshot.key) != snapshot.to_json():
        dataset.put(snapshot.key, snapshot.to_json())
    while True:
        last = last_taken(dataset)
        if last is not None and last[1] == snapshot.id:
            return
        number = 0 if last is None else last[0] + 1
        entry = {"id": snapshot.id, "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        if dataset.put_new(f"{HISTORY}{number:06d}.json", canonical_json(entry)):
            return


@dataclass
class Verification:
    """What `verify` found."""

    parts: Counter[str] = field(default_factory=Counter)
    """Kind -> parts that are right."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Kind -> bytes of their payloads."""
    snapshots: int = 0
    problems: list[str] = field(default_factory=list)
    """Each names the object and what to do."""


def verify(dataset: Store, deep: bool = False) -> Verification:
    """Check all commits and snapshots against what lies in the store, and the families against the pairs.

    Args:
        dataset: the dataset's store.
        deep: read every payload and compare hash, rows and sample ids, too; otherwise only presence and size.
    """
    found = Verification()
    families = read_families(dataset)
    for kind in [PAIRS, *sorted(families)]:

        def check(part: Part, kind: str = kind) -> Commit | str:
            try:
                commit = read_commit(dataset, kind, part)
                _check_part(dataset, commit, families.get(kind), deep)
                return commit
            except (UserError, FileNotFoundError) as error:
                return f"{dataset.uri}/{part.commit_key(kind)}: {error}: {REPAIR}"

        with ThreadPoolExecutor(8) as pool:
            for result in pool.map(check, sorted(committed_parts(dataset, kind))):
                if isinstance(result, str):
                    found.problems.append(result)
                else:
                    found.parts[kind] += 1
                    found.bytes[kind] += sum(file.bytes for file in result.files)
    for id in _snapshot_ids(dataset):
        found.snapshots += 1
        found.problems += _snapshot_problems(dataset, id)
    return found


def _check_part(dataset: Store, commit: Commit, family: Family | None, deep: bool) -> None:
    """Raises:
    UserError: the part is not what its commit says.
    """
    if family:
        pairs = read_commit(dataset, PAIRS, commit.part)
        if (pairs.rows, pairs.ids_xxh64) != (commit.rows, commit.ids_xxh64):
            raise UserError("other samples than the pairs of this part")
        if family.hash != commit.family_hash:
            raise UserError(f"not made by family `{family.name}` as registered")
    for file in commit.files:
        if dataset.size(file.key) != file.bytes:
            raise UserError(f"{file.key} does not have {file.bytes:,} bytes")
    if not deep:
        return
    ids: list[int] = []
    with TemporaryDirectory(prefix="li-dit-") as folder:
        for file in commit.files:
            path = Path(folder) / file.key.rpartition("/")[2]
            dataset.fetch(file, path)
            if family:
                ids = [row["id"] for row in Shard(path, family.columns)]
            elif path.name == TABLE:
                ids = pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()
    if len(ids) != commit.rows or hash_ids(ids) != commit.ids_xxh64:
        raise UserError("the payload holds other samples than the commit says")


def _snapshot_ids(dataset: Store) -> list[str]:
    return [name for name in dataset.folders("snapshots/") if dataset.exists(f"snapshots/{name}/snapshot.json")]


def _snapshot_problems(dataset: Store, id: str) -> list[str]:
    try:
        snapshot = read_snapshot(dataset, id)
        indexes = [read_index(dataset, snapshot, bucket) for bucket in snapshot.buckets]
    except UserError as error:
        return [str(error)]
    files = [file for index in indexes for file in _index_files(index, snapshot.families)]
    with ThreadPoolExecutor(THREADS) as pool:
        there = pool.map(lambda file: dataset.exists(file.key) and dataset.size(file.key) == file.bytes, files)
        return [
            f"{dataset.uri}/{file.key}: missing or of another size, but snapshot {id} needs it: take another snapshot"
            for file, right in zip(files, there, strict=True)
            if not right
        ]


def _index_files(index: pyarrow.Table, families: Iterable[str]) -> list[StoredFile]:
    rows = index.to_pylist()
    return [StoredFile(*(row[f"{name}.{of}"] for of in ("key", "bytes", "xxh64"))) for row in rows for name in families]


PAYLOAD = re.compile(r"((?:pairs|families/[^/]+)/[^/]+/\d{5,}/[0-9a-f]{16})/[^/]+")
CONSTANTS = re.compile(r"families/[^/]+/constants-[0-9a-f]{16}\.safetensors")
INDEX = re.compile(r"(snapshots/[0-9a-f]{16})/[^/]+-([0-9a-f]{16})\.parquet")


def collect_garbage(dataset: Store, older_than_hours: float = 24, delete: bool = False) -> list[str]:
    """Find what killed or beaten writers left, and remove it if asked.

    Garbage is: payloads, constants and indexes that no commit, family or snapshot names, and temporary files; only if the whole
    attempt is older than the limit. Candidates are listed before the commits are read, so what is committed meanwhile
    is safe; the limit protects writers that have not committed yet, so it must exceed the time a task takes from its first
    upload to its commit (seconds, or the retry time when the store fails).

    Returns:
        The keys that are garbage, now removed if `delete`.

    Raises:
        StoreError: a commit or an index cannot be read; then nothing is removed, for it may name any of the candidates.
    """
    before = time.time() - 3600 * older_than_hours
    groups: dict[str, list[str]] = defaultdict(list)
    newest: dict[str, float] = defaultdict(float)
    for key, modified in dataset.entries(""):
        group = _garbage_group(key)
        if group:
            groups[group].append(key)
            newest[group] = max(newest[group], modified)
    live = _live_groups(dataset)
    garbage = sorted(key for group, keys in groups.items() if group not in live and newest[group] < before for key in keys)
    if delete:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(dataset.delete, garbage))
    return garbage


def _garbage_group(key: str) -> str | None:
    """What lives and dies with an object: its attempt's folder, or the object itself; None = never garbage."""
    if key.rpartition("/")[2].startswith("."):
        return key
    if attempt := PAYLOAD.fullmatch(key):
        return attempt[1]
    return key if CONSTANTS.fullmatch(key) or INDEX.fullmatch(key) else None


def _live_groups(dataset: Store) -> set[str]:
    """Groups that a commit, a family or a snapshot names. Indexes of older records of a snapshot count, see `take_snapshot`."""
    files: list[StoredFile] = []
    for kind in dataset.folders("commits/"):
        files += [file for commit in committed(dataset, kind).values() for file in commit.files]
    live = {family.constants_key for family in read_families(dataset).values()}
    snapshots = {f"snapshots/{id}" for id in _snapshot_ids(dataset)}
    for key in dataset.list("snapshots/"):
        index = INDEX.fullmatch(key)
        if not index or index[1] not in snapshots:
            continue
        live.add(key)
        data = dataset.read(key)
        if xxhash.xxh64_hexdigest(data) != index[2]:
            raise StoreError(f"{dataset.uri}/{key}: damaged, so what it names is unknown: delete it and take the snapshot again")
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        names = [column.removesuffix(".key") for column in table.column_names if column.endswith(".key")]
        files += _index_files(table, names)
    return live | {file.key.rpartition("/")[0] for file in files}
