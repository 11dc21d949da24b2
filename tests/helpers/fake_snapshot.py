"""Snapshots whose every byte follows from the sample's id, so that a reader's result can be recomputed."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, register_family
from data_prep.dataset.schema import PAIRS, Bucket, Family, Manifest, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.users import UserIndex, write_names
from data_prep.store.store import open_store
from model.encoders.token_size import bytes_per_token
from pipeline.stage.config import StageConfig

KINDS = ["original", "synthetic"]
CHANNELS, DOWN = 2, 8
WIDTHS = {"small": (6, "int8"), "wide": (10, "bf16")}
PREFIX, NULL = 3, 2

LATENTS = Family(
    "latents",
    "latents",
    {"model": "fake"},
    {"channels": CHANNELS, "downsampling": DOWN, "scaling_factor": 1.0, "shift_factor": 0.0},
)
CLIPS = Family(
    "latents", "latents", {"model": "fake of clips"}, {**LATENTS.info, "downsampling": [4, DOWN, DOWN]}
)
"""Latents with a time axis, of clips and of images."""
TEXTS = {
    name: Family(
        name,
        "text",
        {"llm": f"fake {name}"},
        {"width": width, "prefix_tokens": PREFIX, "quantisation": quantisation},
    )
    for name, (width, quantisation) in WIDTHS.items()
}
FAMILIES = [LATENTS, *TEXTS.values()]


def rng(*keys):
    return np.random.default_rng([ord(letter) for key in keys for letter in str(key)])


def captions(id):
    """Kind of each caption of a sample; some samples have none."""
    draw = rng("captions", id)
    return draw.integers(0, len(KINDS), int(draw.integers(0, 4))).astype(np.uint8)


def latents_row(id, bucket):
    size = Bucket.parse(bucket)
    frames = 1 + (size.frames - 1) // 4
    shape = (CHANNELS, frames, size.height // DOWN, size.width // DOWN)
    mean, std = (
        torch.from_numpy(rng(name, id).standard_normal(shape)).to(torch.bfloat16) for name in ("mean", "std")
    )
    return {
        "id": id,
        "mean": mean.view(torch.uint8).numpy().tobytes(),
        "std": std.view(torch.uint8).numpy().tobytes(),
    }


def text_row(id, family):
    width, quantisation = WIDTHS[family]
    kinds = captions(id)
    tokens = rng("tokens", id, family).integers(1, 6, len(kinds)).astype("<i4")  # other LLM, other tokens
    values = (
        rng("values", id, family)
        .integers(0, 60, (int(tokens.sum()), bytes_per_token(quantisation, width)))
        .astype(np.uint8)
    )
    scales = rng("scales", id, family).random(0 if quantisation == "bf16" else len(values)).astype("<f4")
    columns = {"kinds": kinds, "tokens": tokens, "values": values, "scales": scales}
    return {"id": id, **{name: array.tobytes() for name, array in columns.items()}}


def constants(family, dataset="ds"):
    width, draw = WIDTHS[family][0], rng("constants", family, *([] if dataset == "ds" else [dataset]))
    shapes = {"prefix_states": (PREFIX, width), "null_states": (NULL, width), "mean": (width,)}
    tensors = {name: torch.from_numpy(draw.standard_normal(shape)).float() for name, shape in shapes.items()}
    return {**tensors, "spread": torch.from_numpy(draw.random(width) + 0.5).float()}


def user_of(id, users):
    """Number of a sample's user; one in `users` + 1 samples has none."""
    return id % (users + 1) - 1


def ids_of(buckets):
    """Ids of each part: bucket number in the upper half, then counted."""
    found = {}
    for number, bucket in enumerate(sorted(buckets)):
        at = number << 32
        for part, rows in enumerate(buckets[bucket]):
            found[Part(bucket, part)] = list(range(at, at + rows))
            at += rows
    return found


def make(uri, buckets, folder, families=FAMILIES, name="ds", users=0):
    """Commit all parts and take a snapshot; `buckets`: name -> rows of its parts; `users`: their number."""
    dataset = open_store(str(uri), create=True).sub(name)
    table = folder / "pairs.parquet"
    if users:
        ids = sorted(id for part in ids_of(buckets).values() for id in part if user_of(id, users) >= 0)
        write_names(dataset, [f"user {number}" for number in range(users)])
        owners = np.array([user_of(id, users) for id in ids], dtype=np.int32)
        UserIndex(np.array(ids, dtype=np.int64), owners).write(dataset)
    dataset.put_new(
        Manifest.KEY, Manifest(name, KINDS, {key: list(rows) for key, rows in buckets.items()}).to_json()
    )
    registered = [
        register_family(dataset, family, constants(family.name, name) if family.kind == "text" else None)
        for family in families
    ]
    path = folder / "shard.00000.mds"
    for part, ids in ids_of(buckets).items():
        path.write_bytes(b"pairs are not read here")
        files = {"pairs.tar": path}
        if users:
            pq.write_table(pa.table({"id": ids}), table)
            files["pairs.parquet"] = table
        commit_part(dataset, PAIRS, part, files, ids, {})
        for family in registered:
            rows = [
                latents_row(id, part.bucket) if family.kind == "latents" else text_row(id, family.name)
                for id in ids
            ]
            rows = [{name: row[name] for name in family.columns} for row in rows]
            write_mds(path, family.columns, rows)
            commit_part(dataset, family.name, part, {"shard.00000.mds": path}, ids, {}, family.hash)
    return take_snapshot(dataset)


TWO_BUCKETS = {"32x32": [20, 12], "32x64": [16]}


def make_local(folder, buckets):
    """`make` in a folder; gives the store's path."""
    make(folder / "store", buckets, folder)
    return folder / "store"


def stage(uri, cache, **settings):
    """A stage that reads such a snapshot; settings of its data by name, or `global_batch`, `families`."""
    config = StageConfig(name="test", global_batch=settings.pop("global_batch", 4), samples=1000)
    config.data.store, config.data.dataset, config.data.cache = str(uri), "ds", str(cache)
    config.fusion.families = list(settings.pop("families", TEXTS))
    config.data.workers = 0
    for key, value in settings.items():
        assert hasattr(config.data, key)
        setattr(config.data, key, value)
    return config
