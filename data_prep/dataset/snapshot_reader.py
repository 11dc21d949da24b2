"""Reading what a training run needs to know about a dataset: its families, its snapshots, the captions of its pairs."""

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


def read_families(dataset: Store) -> dict[str, Family]:
    """All registered families by name."""
    names = [name for name in dataset.folders("families/") if dataset.exists(f"families/{name}/family.json")]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: read_family(dataset, name), names), strict=True))


def read_family(dataset: Store, name: str) -> Family:
    """A registered family.

    Raises:
        UserError: there is none of that name.
    """
    try:
        return Family.from_json(dataset.read(f"families/{name}/family.json"))
    except FileNotFoundError as error:
        there = ", ".join(dataset.folders("families/")) or "none"
        raise UserError(f"{dataset.uri}: no family `{name}` (there is: {there}): correct the name, or encode it first") from error


def read_constants(dataset: Store, family: Family) -> "dict[str, Tensor]":
    """The tensors that a family stores once, by name; empty if it has none.

    Raises:
        StoreError: they are damaged.
    """
    from safetensors.torch import load

    if not family.constants_xxh64:
        return {}
    data = dataset.read(family.constants_key)
    if xxhash.xxh64_hexdigest(data) != family.constants_xxh64:
        raise StoreError(f"{dataset.uri}/{family.constants_key}: damaged: encode family `{family.name}` anew under another name")
    return load(data)


def read_snapshot(dataset: Store, id: str = "latest") -> Snapshot:
    """A snapshot by its id, or the one taken last.

    Raises:
        UserError: there is no such snapshot.
        StoreError: its record is damaged.
    """
    if id == "latest":
        taken = last_taken(dataset)
        if taken is None:
            raise UserError(f"{dataset.uri}: no snapshot yet: run `python -m data_prep snapshot DATASET.yaml`")
        id = taken[1]
    try:
        snapshot = Snapshot.from_json(dataset.read(f"snapshots/{id}/snapshot.json"))
    except FileNotFoundError as error:
        there = ", ".join(name for name in dataset.folders("snapshots/") if name != "history") or "none"
        raise UserError(f"{dataset.uri}: no snapshot `{id}` (there is: {there}): correct the id, or use `latest`") from error
    if snapshot.id != id:
        raise StoreError(f"{dataset.uri}/snapshots/{id}/snapshot.json: damaged: delete it and take the snapshot again")
    return snapshot


def last_taken(dataset: Store) -> tuple[int, str] | None:
    """Number and id of the snapshot taken last."""
    keys = list(dataset.list(HISTORY))
    if not keys:
        return None
    number = int(keys[-1].removeprefix(HISTORY).removesuffix(".json"))
    return number, json.loads(dataset.read(keys[-1]))["id"]


def read_index(dataset: Store, snapshot: Snapshot, bucket: str) -> pyarrow.Table:
    """The index of one bucket: a row a part, see `Snapshot`.

    Raises:
        StoreError: it is missing or damaged.
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
    """Captions of the pairs of one part: sample id -> kinds (indices into the dataset's `caption_kinds`) and texts.

    Args:
        dataset: the dataset's store.
        part: which part.
        ids_xxh64: hash of its sample ids, as the snapshot has it.

    Raises:
        StoreError: the part is missing or damaged, or holds other samples.
    """
    key = part.commit_key(PAIRS)
    try:
        commit = Commit.from_json(dataset.read(key))
        file = next(file for file in commit.files if file.key.endswith(f"/{TABLE}"))
        data = dataset.read(file.key)
    except (FileNotFoundError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise StoreError(f"{dataset.uri}/{key}: missing or damaged: run `python -m data_prep verify`") from error
    if commit.ids_xxh64 != ids_xxh64 or xxhash.xxh64_hexdigest(data) != file.xxh64:
        raise StoreError(f"{dataset.uri}/{file.key}: damaged, or of other samples: run `python -m data_prep verify`")
    rows = pyarrow.parquet.read_table(io.BytesIO(data), columns=["id", "captions"]).to_pylist()
    return {row["id"]: [(caption["kind"], caption["text"]) for caption in row["captions"]] for row in rows}
