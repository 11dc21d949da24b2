"""Parts: who does which, how one becomes visible, and which are.

The protocol: a writer puts its payload under keys that hold a random name of this attempt, then one small commit record by a
conditional put. The record is the part's existence, so a reader sees a part whole or not at all; of any number of writers one
wins; a writer killed anywhere leaves files that no commit names, which `gc` removes. Nothing is overwritten.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash

from data_prep.dataset.schema import PAIRS, Commit, Family, Manifest, Part, canonical_json
from data_prep.dataset.snapshot_reader import read_family
from data_prep.store.store import Store, StoredFile, StoreError, hash_file
from model.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")

PLAN_KEY = "manifest/plan.json"
THREADS = 32
"""Commits read at once."""


@dataclass(frozen=True)
class Share:
    """What one of `count` array tasks does: the `index`-th of as many equal runs of neighbouring items. Needs no lock, so nothing
    can hang on one; the commit protocol makes an overlap harmless."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"task {self.index} of {self.count}: tasks are numbered from 0 to one below their number")

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `I/N`.

        Raises:
            UserError: it is not of that form.
        """
        if not re.fullmatch(r"\d+/\d+", text):
            raise UserError(f"task `{text}`: write I/N, for instance 0/64")
        index, count = map(int, text.split("/"))
        return cls(index, count)

    @classmethod
    def from_environment(cls) -> "Share":
        """The share of this Slurm array task; everything outside an array.

        A sparse array (`--array=3,17`, to repeat some tasks of 64) does not show how many tasks share the work: then
        `LI_DIT_TASKS=64` has to say so.

        Raises:
            UserError: the array is sparse and `LI_DIT_TASKS` is not set, or does not fit.
        """
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        if task is None:
            return cls()
        if tasks := os.environ.get("LI_DIT_TASKS"):
            return cls(int(task), int(tasks))
        count, low, high = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("COUNT", "MIN", "MAX"))
        if high - low + 1 != count:
            raise UserError(
                f"array of {count} tasks between {low} and {high}: set LI_DIT_TASKS to the number of tasks that share the work"
            )
        return cls(int(task) - low, count)

    def owns(self, items: Sequence[Item]) -> list[Item]:
        """This task's items."""
        return list(items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count])

    @staticmethod
    def owner(item: int, items: int, count: int) -> int:
        """Which of `count` tasks has item number `item` of `items`."""
        return (count * (item + 1) - 1) // items


def array_list(numbers: Iterable[int]) -> str:
    """Numbers as Slurm's `--array=` takes them: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def hash_ids(ids: Iterable[int]) -> str:
    """xxh64 of sample ids in row order."""
    return xxhash.xxh64_hexdigest(np.fromiter(ids, "<i8").tobytes())


def read_plan(dataset: Store) -> Manifest:
    """The parts that the plan asks for.

    Raises:
        UserError: there is no plan yet.
    """
    try:
        return Manifest.from_json(dataset.read(Manifest.KEY))
    except FileNotFoundError as error:
        raise UserError(f"{dataset.uri}: no plan yet: run `python -m data_prep plan DATASET.yaml` first") from error


def read_plan_record(dataset: Store) -> dict[str, Any]:
    """What the plan counted: `files` (a record a source file: label, rows, kept, dropped by reason), `captions` (kept by kind,
    letters by kind, refused by reason), `manifest` (xxh64 by key)."""
    return json.loads(dataset.read(PLAN_KEY))


def read_commit(dataset: Store, kind: str, part: Part) -> Commit:
    """The commit of one part.

    Raises:
        FileNotFoundError: the part does not exist.
        StoreError: the record is not that part's.
    """
    key = part.commit_key(kind)
    try:
        commit = Commit.from_json(dataset.read(key))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{dataset.uri}/{key}: damaged: delete it and do the part again") from error
    if (commit.kind, commit.part) != (kind, part):
        raise StoreError(f"{dataset.uri}/{key}: is the record of {commit.kind} {commit.part}: delete it and do the part again")
    return commit


def committed_parts(dataset: Store, kind: str) -> set[Part]:
    """The parts of a kind that exist; lists keys only."""
    parts = set()
    for key in dataset.list(f"commits/{kind}/"):
        bucket, _, name = key.removeprefix(f"commits/{kind}/").partition("/")
        if not re.fullmatch(r"\d+\.json", name):
            raise StoreError(f"{dataset.uri}/{key}: not a commit: remove it")
        parts.add(Part(bucket, int(name.removesuffix(".json"))))
    return parts


def committed(dataset: Store, kind: str) -> dict[Part, Commit]:
    """The commits of a kind, sorted by part."""
    parts = sorted(committed_parts(dataset, kind))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(parts, pool.map(lambda part: read_commit(dataset, kind, part), parts), strict=True))


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
        part: which part.
        files: name of each payload file -> the local file; none for a part that ended without rows.
        ids: sample ids in row order.
        counts: whatever the writer counted.
        family_hash: `Family.hash`, for families.

    Returns:
        The commit that stands: ours, or that of another task that was first.

    Raises:
        UserError: the other task committed other samples under this part.
        StoreError: the payload did not arrive.
    """
    ids_hash = hash_ids(ids)
    if not dataset.exists(part.commit_key(kind)):
        attempt = secrets.token_hex(8)
        stored = []
        for name, path in sorted(files.items()):
            key = part.payload_key(kind, attempt, name)
            stored.append(StoredFile(key, path.stat().st_size, hash_file(path)))
            dataset.put(key, path)
        for file in stored:
            # A task that was suspended for days could otherwise commit files that `gc` took for orphans meanwhile.
            if not dataset.exists(file.key) or dataset.size(file.key) != file.bytes:
                raise StoreError(f"{dataset.uri}/{file.key}: not there as written: run again")
        commit = Commit(kind, part.bucket, part.number, len(ids), attempt, ids_hash, stored, family_hash, counts)
        if dataset.put_new(part.commit_key(kind), commit.to_json()):
            return commit
        for file in stored:
            dataset.delete(file.key)
    winner = read_commit(dataset, kind, part)
    if (winner.ids_xxh64, winner.family_hash) != (ids_hash, family_hash):
        raise UserError(
            f"{dataset.uri}: {kind} {part} is committed with other samples or another encoder: the plan or the family changed "
            "under a running job; use another dataset or family name for the new settings"
        )
    return winner


def register_family(dataset: Store, family: Family, constants: "dict[str, Tensor] | None") -> Family:
    """Register a family with its constants, unless it is registered already.

    Returns:
        The family that stands. Take the constants from the store (`read_constants`), not from the arguments: another task may
        have been first, with values that differ in the last bits.

    Raises:
        UserError: the name belongs to another encoding; the message says what differs.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", family.name) or family.name == PAIRS:
        raise UserError(f"family name {family.name!r}: use letters, digits, `.`, `_` and `-`, and not `{PAIRS}`")
    if not dataset.exists(family.key):
        if constants:
            from safetensors.torch import save

            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()})
            family = replace(family, constants_xxh64=xxhash.xxh64_hexdigest(data))
            dataset.put_new(family.constants_key, data)
        dataset.put_new(family.key, family.to_json())
    stored = read_family(dataset, family.name)
    ours, theirs = ({"kind": f.kind, **f.identity, **f.info, "format": f.format} for f in (family, stored))
    differing = [key for key in sorted({*ours, *theirs}) if canonical_json(ours.get(key)) != canonical_json(theirs.get(key))]
    if differing:
        what = "; ".join(f"{key}: stored {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differing)
        raise UserError(f"{dataset.uri}: family `{family.name}` is another encoding ({what}): give the new one another name")
    return stored
