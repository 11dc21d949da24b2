"""Read what a training run needs of a dataset: its families, its snapshots, the captions of its pairs."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow

from data_prep.dataset.records import hashed, parse_table, read_object
from data_prep.dataset.schema import PAIRS, TABLE, Commit, Family, Part, Snapshot, Taken
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError
from model.common.records import parse_record

if TYPE_CHECKING:
    from torch import Tensor

HISTORY = "snapshots/history/"
VERIFY = "run `python -m data_prep verify`"
TAKE_AGAIN = "delete it and take the snapshot again"


def family_names(dataset: Store) -> list[str]:
    """Return the names of all registered families."""
    # A writer that was killed may have left a folder without the record that registers the family.
    return [name for name in dataset.folders("families/") if dataset.exists(f"families/{name}/family.json")]


def read_families(dataset: Store) -> dict[str, Family]:
    """Return all registered families by name."""
    names = family_names(dataset)
    with ThreadPoolExecutor(8) as pool:
        families = pool.map(lambda name: read_family(dataset, name), names)
        return dict(zip(names, families, strict=True))


def read_family(dataset: Store, name: str) -> Family:
    """Return a registered family.

    Raises:
        UserError: if no family has that name.
    """
    try:
        way_out = "bring it back from a copy, or encode the family under another name"
        return read_object(dataset, f"families/{name}/family.json", Family.from_json, way_out)
    except FileNotFoundError as error:
        names = ", ".join(dataset.folders("families/")) or "none"
        raise UserError(
            f"{dataset.uri}: no family `{name}` (there is: {names}): correct the name, or encode it first"
        ) from error


def read_constants(dataset: Store, family: Family) -> "dict[str, Tensor]":
    """Return the tensors that a family stores once, by name; empty if it has none.

    Raises:
        StoreError: if they are missing or damaged.
    """
    from safetensors.torch import load  # imports torch, which most readers do not need

    if not family.constants_xxh64:
        return {}
    way_out = f"bring it back from a copy, or encode family `{family.name}` under another name"
    try:
        data = read_object(dataset, family.constants_key, hashed(family.constants_xxh64), way_out)
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{family.constants_key}: missing: {way_out}") from error
    return load(data)


def read_snapshot(dataset: Store, id: str = "latest") -> Snapshot:
    """Return a snapshot by its id, or the one taken last.

    Args:
        dataset: the dataset's store.
        id: the snapshot's id, or `latest`.

    Raises:
        UserError: if there is no such snapshot.
        StoreError: if its record is damaged.
    """
    if id == "latest":
        taken = last_taken(dataset)
        if taken is None:
            raise UserError(
                f"{dataset.uri}: no snapshot yet: run `python -m data_prep snapshot DATASET.yaml`"
            )
        id = taken[1]

    def parse(data: bytes) -> Snapshot:
        snapshot = Snapshot.from_json(data)
        if snapshot.id != id:  # which is a hash of the record
            raise ValueError("its content does not match its id")
        return snapshot

    try:
        return read_object(dataset, f"snapshots/{id}/snapshot.json", parse, TAKE_AGAIN)
    except FileNotFoundError as error:
        ids = ", ".join(name for name in dataset.folders("snapshots/") if name != "history") or "none"
        raise UserError(
            f"{dataset.uri}: no snapshot `{id}` (there is: {ids}): correct the id, or use `latest`"
        ) from error


def last_taken(dataset: Store) -> tuple[int, str] | None:
    """Return number and id of the snapshot taken last; None if there is no snapshot.

    Raises:
        StoreError: if a file among the entries is not one, or the last one is damaged.
    """
    keys = list(dataset.list(HISTORY))
    for key in keys:
        # Ignored, a renamed entry would silently make an older snapshot the latest.
        if not re.fullmatch(r"\d{6}\.json", key.removeprefix(HISTORY), re.ASCII):
            raise StoreError(f"{dataset.uri}/{key}: not an entry of the history: remove it")
    if not keys:
        return None

    # Keys are listed in order and their numbers have six digits, so the last key is the newest.
    entry = read_object(dataset, keys[-1], lambda data: parse_record(Taken, data), TAKE_AGAIN)
    return int(keys[-1].removeprefix(HISTORY).removesuffix(".json")), entry.id


def read_index(dataset: Store, snapshot: Snapshot, bucket: str) -> pyarrow.Table:
    """Return the index of one bucket: one row per part, see `Snapshot`.

    Raises:
        StoreError: if it is missing or damaged.
    """
    key = snapshot.index_key(bucket)
    return read_index_file(dataset, key, snapshot.buckets[bucket]["index_xxh64"])


def read_index_file(dataset: Store, key: str, xxh64: str) -> pyarrow.Table:
    """Return the index under a key.

    Raises:
        StoreError: if it is missing or damaged.
    """
    check = hashed(xxh64)
    try:
        return read_object(dataset, key, lambda data: parse_table(check(data)), TAKE_AGAIN)
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{key}: missing: take the snapshot again") from error


def missing_payloads(dataset: Store, family: str, keys: Iterable[str]) -> list[str]:
    """Return those of a family's payload keys that are not in the store, by one listing."""
    present = set(dataset.list(f"families/{family}/"))
    return [key for key in keys if key not in present]


def check_payloads(dataset: Store, snapshot: Snapshot, families: Iterable[str]) -> None:
    """Check that the store has the files of a snapshot.

    Args:
        dataset: the dataset's store.
        snapshot: one of its snapshots.
        families: the families that will be read.

    Raises:
        StoreError: if a file or an index is missing.
    """
    indexes = [read_index(dataset, snapshot, bucket) for bucket in snapshot.buckets]
    for family in families:
        keys = [key for index in indexes for key in index[f"{family}.key"].to_pylist()]
        missing = missing_payloads(dataset, family, keys)
        if missing:
            raise StoreError(
                f"{dataset.uri}/{missing[0]}: missing, one of {len(missing)} such files: {VERIFY}"
            )


def read_captions(dataset: Store, part: Part, ids_xxh64: str) -> dict[int, list[tuple[int, str]]]:
    """Return the captions of the pairs of one part.

    Args:
        dataset: the dataset's store.
        part: the part.
        ids_xxh64: hash of its sample ids, as the snapshot records it.

    Returns:
        Sample id -> (kind, text) of each caption; kinds are indices into the dataset's `caption_kinds`.

    Raises:
        StoreError: if the part is missing or damaged, or holds other samples.
    """
    key, columns = part.commit_key(PAIRS), ["id", "captions"]
    try:
        commit = read_object(dataset, key, Commit.from_json, VERIFY)
        tables = [file for file in commit.files if file.key.endswith(f"/{TABLE}")]
        # The index names no file of the pairs, so the hash of the ids connects the captions to the snapshot's
        # rows.
        if commit.ids_xxh64 != ids_xxh64 or len(tables) != 1:
            raise StoreError(f"{dataset.uri}/{key}: of other samples: {VERIFY}")
        check, columns = hashed(tables[0].xxh64), ["id", "captions"]
        table = read_object(
            dataset, tables[0].key, lambda data: parse_table(check(data), columns=columns), VERIFY
        )
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{key}: it or its table is missing: {VERIFY}") from error

    captions = {}
    for row in table.to_pylist():
        captions[row["id"]] = [(caption["kind"], caption["text"]) for caption in row["captions"]]
    return captions
