"""Read what a training run needs of a dataset: its families, its snapshots, the captions of its pairs."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import xxhash

from data_prep.dataset.schema import PAIRS, TABLE, Commit, Family, Part, Snapshot
from data_prep.store.store import Store, StoreError
from model.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HISTORY = "snapshots/history/"
VERIFY = "run `python -m data_prep verify`"


def read_families(dataset: Store) -> dict[str, Family]:
    """Return all registered families by name."""
    # A writer that was killed may have left a folder without the record that registers the family.
    names = [name for name in dataset.folders("families/") if dataset.exists(f"families/{name}/family.json")]
    with ThreadPoolExecutor(8) as pool:
        families = pool.map(lambda name: read_family(dataset, name), names)
        return dict(zip(names, families, strict=True))


def read_family(dataset: Store, name: str) -> Family:
    """Return a registered family.

    Raises:
        UserError: if no family has that name.
    """
    try:
        return Family.from_json(dataset.read(f"families/{name}/family.json"))
    except FileNotFoundError as error:
        names = ", ".join(dataset.folders("families/")) or "none"
        raise UserError(
            f"{dataset.uri}: no family `{name}` (there is: {names}): correct the name, or encode it first"
        ) from error


def read_constants(dataset: Store, family: Family) -> "dict[str, Tensor]":
    """Return the tensors that a family stores once, by name; empty if it has none.

    Raises:
        StoreError: if they are damaged.
    """
    from safetensors.torch import load  # imports torch, which most readers do not need

    if not family.constants_xxh64:
        return {}
    data = dataset.read(family.constants_key)
    if xxhash.xxh64_hexdigest(data) != family.constants_xxh64:
        raise StoreError(
            f"{dataset.uri}/{family.constants_key}: damaged: "
            f"encode family `{family.name}` again under another name"
        )
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

    try:
        snapshot = Snapshot.from_json(dataset.read(f"snapshots/{id}/snapshot.json"))
    except FileNotFoundError as error:
        ids = ", ".join(name for name in dataset.folders("snapshots/") if name != "history") or "none"
        raise UserError(
            f"{dataset.uri}: no snapshot `{id}` (there is: {ids}): correct the id, or use `latest`"
        ) from error

    # The id is a hash of the record.
    if snapshot.id != id:
        key = f"{dataset.uri}/snapshots/{id}/snapshot.json"
        raise StoreError(f"{key}: damaged: delete it and take the snapshot again")
    return snapshot


def last_taken(dataset: Store) -> tuple[int, str] | None:
    """Return number and id of the snapshot taken last; None if there is no snapshot."""
    keys = list(dataset.list(HISTORY))
    if not keys:
        return None
    # Keys are listed in order and their numbers have six digits, so the last key is the newest.
    number = int(keys[-1].removeprefix(HISTORY).removesuffix(".json"))
    return number, json.loads(dataset.read(keys[-1]))["id"]


def read_index(dataset: Store, snapshot: Snapshot, bucket: str) -> pyarrow.Table:
    """Return the index of one bucket: one row per part, see `Snapshot`.

    Raises:
        StoreError: if it is missing or damaged.
    """
    key = snapshot.index_key(bucket)
    try:
        data = dataset.read(key)
    except FileNotFoundError as error:
        raise StoreError(f"{dataset.uri}/{key}: missing: take the snapshot again") from error

    if xxhash.xxh64_hexdigest(data) != snapshot.buckets[bucket]["index_xxh64"]:
        raise StoreError(f"{dataset.uri}/{key}: damaged: delete it and take the snapshot again")
    return pyarrow.parquet.read_table(io.BytesIO(data))


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
    key = part.commit_key(PAIRS)
    try:
        commit = Commit.from_json(dataset.read(key))
        file = next(file for file in commit.files if file.key.endswith(f"/{TABLE}"))
        data = dataset.read(file.key)
    except (FileNotFoundError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise StoreError(f"{dataset.uri}/{key}: missing or damaged: {VERIFY}") from error

    # The index names no file of the pairs, so the hash of the ids connects the captions to the snapshot's
    # rows.
    if commit.ids_xxh64 != ids_xxh64 or xxhash.xxh64_hexdigest(data) != file.xxh64:
        raise StoreError(f"{dataset.uri}/{file.key}: damaged, or of other samples: {VERIFY}")

    captions = {}
    for row in pyarrow.parquet.read_table(io.BytesIO(data), columns=["id", "captions"]).to_pylist():
        captions[row["id"]] = [(caption["kind"], caption["text"]) for caption in row["captions"]]
    return captions
