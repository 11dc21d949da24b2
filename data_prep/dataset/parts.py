"""Parts: how one is committed, which exist, and how a family is registered.

The protocol: a writer puts its payload under keys that contain a random name of this attempt, then writes
one small commit record by a conditional put. A part exists if and only if its record does, so a reader sees
all of it or nothing. Of several writers exactly one wins. A writer that is killed at any point leaves only
files that no commit names, which `gc` removes. Nothing is ever overwritten.
"""

import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data_prep.dataset.records import read_object
from data_prep.dataset.rollups import Rollups
from data_prep.dataset.schema import CLAIM, PAIRS, Commit, Family, Manifest, Part, PlanRecord
from data_prep.dataset.snapshot_reader import read_family
from data_prep.store.entry import Entry
from data_prep.store.store import Store, StoredFile, StoreError, hash_file
from model.common.errors import UserError
from model.common.records import canonical_json, parse_record
from model.common.share import Share

if TYPE_CHECKING:
    from torch import Tensor

PLAN_KEY = "manifest/plan.json"
PLAN_AGAIN = "bring it back from a copy, or plan again under another dataset name"
THREADS = 32
"""Objects read or deleted at once."""
READ_AT_ONCE = 16
"""Commits that a thread reads one after another."""


def array_list(numbers: Iterable[int]) -> str:
    """Format numbers as Slurm's `--array=` takes them: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])

    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def hash_ids(ids: Iterable[int]) -> str:
    """Return the xxh64 of sample ids in row order."""
    # Little-endian on every machine, since hashes of different machines are compared.
    return xxhash.xxh64_hexdigest(np.fromiter(ids, "<i8").tobytes())


def read_plan(dataset: Store) -> Manifest:
    """Return the parts that the plan asks for.

    Raises:
        UserError: if there is no plan yet.
    """
    try:
        return read_object(dataset, Manifest.KEY, Manifest.from_json, PLAN_AGAIN)
    except FileNotFoundError as error:
        command = "python -m data_prep plan DATASET.yaml"
        raise UserError(f"{dataset.uri}: no plan yet: run `{command}` first") from error


def read_plan_record(dataset: Store) -> PlanRecord:
    """Return the plan's counts, and the hashes of its files.

    Raises:
        StoreError: if the record is missing or damaged.
    """
    try:
        return read_object(dataset, PLAN_KEY, lambda data: parse_record(PlanRecord, data), PLAN_AGAIN)
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{PLAN_KEY}: missing: {PLAN_AGAIN}") from error


def read_commit(dataset: Store, kind: str, part: Part) -> Commit:
    """Return the commit of one part.

    Raises:
        FileNotFoundError: if the part does not exist.
        StoreError: if the record is damaged or belongs to another part.
    """
    return _read_record(dataset, kind, part)[1]


def _read_record(dataset: Store, kind: str, part: Part) -> tuple[bytes, Commit]:
    """Return the commit of one part, and its bytes."""

    def parse(data: bytes) -> tuple[bytes, Commit]:
        return data, Commit.from_json(data)

    key = part.commit_key(kind)
    data, commit = read_object(dataset, key, parse, "delete it and make the part again")

    # A record copied under another key would make a part exist with the rows of another.
    if (commit.kind, commit.part) != (kind, part):
        owner = f"{commit.kind} {commit.part}"
        raise StoreError(f"{dataset.uri}/{key}: is the record of {owner}: delete it and make the part again")
    return data, commit


def committed_parts(dataset: Store, kind: str) -> set[Part]:
    """Return the parts of a kind that exist, read from their keys only.

    Raises:
        StoreError: if a file among the commits is not one.
    """
    return set(_list_commits(dataset, kind))


def commits_of_share(dataset: Store, kind: str, share: Share) -> list[Commit]:
    """Return the commits of a kind in a task's share, including those that another task made."""
    done = committed_parts(dataset, kind)
    return [read_commit(dataset, kind, part) for part in share.owns(read_plan(dataset).parts) if part in done]


def _list_commits(dataset: Store, kind: str) -> dict[Part, Entry]:
    """Return the objects of all commits of a kind."""
    prefix = f"commits/{kind}/"
    entries = {}
    for entry in dataset.listing(prefix):
        bucket, _, name = entry.key.removeprefix(prefix).partition("/")
        digits = name.removesuffix(".json")
        number = int(digits) if digits != name and re.fullmatch(r"\d{1,18}", digits, re.ASCII) else -1
        # Another spelling of the same number would be a second record of one part.
        if digits != f"{number:05d}":
            raise StoreError(f"{dataset.uri}/{entry.key}: not a commit: remove it")
        entries[Part(sys.intern(bucket), number)] = entry
    return entries


def committed(
    dataset: Store,
    kind: str,
    shrink: Callable[[Commit], Commit] = lambda commit: commit,
    rollups_used: set[str] | None = None,
) -> dict[Part, Commit]:
    """Return the commits of a kind, sorted by part: from roll-ups, and those that none has by themselves.

    Args:
        dataset: the dataset's store.
        kind: `pairs`, or the family's name.
        shrink: returns the part of a commit to keep in memory, since there may be a million.
        rollups_used: a set to which the keys of the roll-ups are added that the commits came from.
    """
    listed = _list_commits(dataset, kind)
    rollups = Rollups(dataset, kind, listed)
    commits = {commit.part: shrink(commit) for commit in rollups.read()}
    left = sorted(part for part in listed if part not in commits)
    for part, (data, commit) in zip(left, _read_records(dataset, kind, left), strict=True):
        rollups.add(part, data)
        commits[part] = shrink(commit)
    rollups.write()
    if rollups_used is not None:
        rollups_used |= rollups.used
    return {part: commits[part] for part in sorted(commits)}


def _read_records(dataset: Store, kind: str, parts: Sequence[Part]) -> Iterator[tuple[bytes, Commit]]:
    """Yield bytes and commit of each part, read by threads ahead of their use."""
    # By some at a time: to pass a result from thread to thread takes as long as to parse a record.
    size = max(1, min(READ_AT_ONCE, len(parts) // THREADS))

    def read(start: int) -> list[tuple[bytes, Commit]]:
        return [_read_record(dataset, kind, part) for part in parts[start : start + size]]

    with ThreadPoolExecutor(THREADS) as pool:
        for records in pool.map(read, range(0, len(parts), size)):
            yield from records


def commit_part(
    dataset: Store,
    kind: str,
    part: Part,
    files: dict[str, Path],
    ids: Sequence[int],
    counts: dict[str, float],
    family_hash: str = "",
) -> Commit:
    """Make a part exist, unless it does already.

    Args:
        dataset: the dataset's store.
        kind: `pairs`, or the family's name.
        part: the part.
        files: name of each payload file -> the local file; empty for a part that ended without rows.
        ids: sample ids in row order.
        counts: any numbers that the writer counted.
        family_hash: `Family.hash`, for families.

    Returns:
        The commit that is in the store now: ours, or that of another task that was first.

    Raises:
        UserError: if the other task committed other samples under this part.
        StoreError: if the payload did not arrive.
    """
    ids_hash = hash_ids(ids)
    attempt = secrets.token_hex(8)
    # Tasks make the parts that a listing lacks: to ask for the commit first would hardly ever save an upload.
    stored = _put_payload(dataset, kind, part, attempt, files)
    commit = Commit(kind, part.bucket, part.number, len(ids), attempt, ids_hash, stored, family_hash, counts)
    if dataset.put_new(part.commit_key(kind), commit.to_json()):
        _withdraw_if_collected(dataset, commit)
        return commit

    # Another task was first, so no commit names our payload.
    for file in stored:
        dataset.delete(file.key)
    # The other task's part replaces ours only if it has the same samples, encoded in the same way.
    winner = read_commit(dataset, kind, part)
    if (winner.ids_xxh64, winner.family_hash) != (ids_hash, family_hash):
        raise UserError(
            f"{dataset.uri}: {kind} {part} is committed with other samples or another encoder: the plan or "
            "the family changed under a running job; use another dataset or family name for the new settings"
        )
    return winner


def _put_payload(
    dataset: Store, kind: str, part: Part, attempt: str, files: dict[str, Path]
) -> list[StoredFile]:
    stored = []
    for name, path in sorted(files.items()):
        key = part.payload_key(kind, attempt, name)
        # Hashed before the upload, so that the commit describes what was made and not what arrived.
        stored.append(StoredFile(key, path.stat().st_size, hash_file(path)))
        dataset.put(key, path)

    # If this task was suspended for days, `gc` may have removed the files, which no commit names yet.
    for file in stored:
        if not _is_whole(dataset, file):
            raise StoreError(f"{dataset.uri}/{file.key}: missing or incomplete after writing it: run again")
    return stored


def _is_whole(dataset: Store, file: StoredFile) -> bool:
    """True if a file is in the store with its size."""
    try:
        return dataset.size(file.key) == file.bytes
    except FileNotFoundError:
        return False


def _withdraw_if_collected(dataset: Store, commit: Commit) -> None:
    """Take a commit back if `gc` was collecting its payload at the same time, see `garbage`.

    Raises:
        StoreError: if it was; the part can be made again.
    """
    part = commit.part
    # In this order: a collector that is done has removed its claim, and the payload before that.
    is_claimed = dataset.exists(part.payload_key(commit.kind, commit.attempt, CLAIM))
    if is_claimed or not all(_is_whole(dataset, file) for file in commit.files):
        dataset.delete(part.commit_key(commit.kind))
        raise StoreError(
            f"{dataset.uri}: {commit.kind} {part}: `gc` removed its files before it was committed: "
            "give `gc` more --older-than-hours, and run again"
        )


def register_family(dataset: Store, family: Family, constants: "dict[str, Tensor] | None") -> Family:
    """Register a family with its constants, unless it is registered already.

    Args:
        dataset: the dataset's store.
        family: the family to register.
        constants: tensors that the family stores once, by name.

    Returns:
        The family that is in the store now. Take the constants from the store (`read_constants`), not from
        the arguments: another task may have been first, with values that differ in the last bits.

    Raises:
        UserError: if the name belongs to another encoding; the message says what differs.
    """
    # The name becomes a folder next to `commits/pairs/`, and a hidden one is reserved for temporary files.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", family.name) or family.name == PAIRS:
        rule = f"use letters, digits, `.`, `_` and `-`, and not `{PAIRS}`"
        raise UserError(f"family name {family.name!r}: {rule}")

    if not dataset.exists(family.key):
        if constants:
            from safetensors.torch import save

            # safetensors refuses tensors that are not contiguous.
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()})
            family = replace(family, constants_xxh64=xxhash.xxh64_hexdigest(data))
            # Before the record, so that a family that exists has its constants.
            dataset.put_new(family.constants_key, data)
        dataset.put_new(family.key, family.to_json())

    # Read back, because another task may have registered the name first.
    stored = read_family(dataset, family.name)
    differences = _differences(_encoding(stored), _encoding(family))
    if differences:
        raise UserError(
            f"{dataset.uri}: family `{family.name}` is another encoding ({differences}): "
            "give the new one another name"
        )
    return stored


def _encoding(family: Family) -> dict[str, Any]:
    """Return all fields on which two families of one name have to agree."""
    return {"kind": family.kind, **family.identity, **family.info, "format": family.format}


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> str:
    differences = []
    for key in sorted({*stored, *current}):
        # Compared as JSON, because the stored family went through it: its tuples have become lists.
        if canonical_json(stored.get(key)) != canonical_json(current.get(key)):
            differences.append(f"{key}: stored {stored.get(key)!r}, now {current.get(key)!r}")
    return "; ".join(differences)
