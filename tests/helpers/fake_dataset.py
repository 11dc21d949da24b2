"""A small dataset with real pairs parts, and a fast encoder whose numbers depend only on the pair."""

import hashlib
import io
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data_prep.dataset.parts import commit_part, committed_parts, read_plan, register_family
from data_prep.dataset.schema import PAIRS, Family, Manifest
from data_prep.families.encode import encode_family
from data_prep.pairs.pairs import COLUMNS, TABLE, TAR
from model.common.share import Share

ALONE = Share(0, 1)

FAMILIES = [
    Family("latents", "latents", {"model": "fake"}, {"channels": 1}),
    Family("llm", "text", {"model": "fake", "layer": 3}, {"width": 2}),
]


def plan(dataset, buckets):
    """Write the plan; `buckets` maps names to the planned rows of their parts."""
    dataset.put_new(Manifest.KEY, Manifest("ds", ["original"], buckets).to_json())


def sample_ids(dataset, part):
    manifest = read_plan(dataset)
    before = sum(manifest.buckets[part.bucket][: part.number])
    first = (sorted(manifest.buckets).index(part.bucket) << 32) + before
    return list(range(first, first + manifest.buckets[part.bucket][part.number]))


def one_caption(id):
    """Return kind and text of each caption of a sample."""
    return [(0, f"caption {id}")]


def make_pairs(dataset, share=ALONE, drop=(), captions=one_caption):
    """Commit the missing pairs parts; samples in `drop` are lost at decoding."""
    done = committed_parts(dataset, PAIRS)
    for part in share.owns(read_plan(dataset).parts):
        if part not in done:
            ids = [id for id in sample_ids(dataset, part) if id not in drop]
            commit_pairs(dataset, part, ids, captions)


def commit_pairs(dataset, part, ids, captions=one_caption):
    rows = []
    for id in ids:
        row = {
            "id": id,
            "key": f"k{id}",
            "captions": [{"kind": kind, "text": text} for kind, text in captions(id)],
            **dict.fromkeys(("height", "width", "original_height", "original_width", "bytes"), 64),
            "crop": [0.0, 0.0, 64.0, 64.0],
            "member": f"{id:019d}.jpg",
        }
        rows.append(row)

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in (TABLE, TAR)} if ids else {}
        if ids:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, COLUMNS), files[TABLE])
            with tarfile.open(files[TAR], "w") as tar:
                for row in rows:
                    data = b"image %d" % row["id"]
                    member = tarfile.TarInfo(row["member"])
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return commit_part(dataset, PAIRS, part, files, ids, {})


def encoder(family, nap=0.0):
    """Return a function that replaces a VAE or an LLM; it sleeps `nap` seconds per call."""
    return partial(_encode, family, nap)


def _encode(family, nap, pairs):
    time.sleep(nap)
    rows = []
    for pair in pairs:
        numbers = hashlib.sha256(pair.image + pair.captions[0][1].encode()).digest()
        if family.kind == "latents":
            rows.append({"id": pair.id, "mean": numbers, "std": numbers[::-1]})
        else:
            tokens = 1 + pair.id % 3
            rows.append(
                {
                    "id": pair.id,
                    "kinds": b"\0",
                    "tokens": tokens.to_bytes(4, "little"),
                    "values": numbers[: 2 * tokens],
                    "scales": numbers[: 4 * tokens],
                }
            )
    return rows, {"rows": len(rows)}


def make_families(dataset, share=ALONE, nap=0.0):
    for family in FAMILIES:
        encode_family(dataset, register_family(dataset, family, None), encoder(family, nap), share)


def make_all(dataset, buckets, share=ALONE, nap=0.0):
    plan(dataset, buckets)
    make_pairs(dataset, share)
    make_families(dataset, share, nap)
