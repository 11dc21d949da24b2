"""Images and sources made by code: good ones and hostile ones."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.config import BucketConfig, DatasetConfig, SourceConfig
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import read_pairs, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.share import Share

ALONE = Share(0, 1)


def picture(seed, height=48, width=48):
    """A smooth colour picture that differs from seed to seed."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(seed, height=48, width=48):
    return encoded(picture(seed, height, width))


def tar_bytes(members, end=True):
    """A tar of (name, bytes); `end=False` cuts it behind the last member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        length = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def sample_members(key, image, record, suffix="png"):
    return [(f"{key}.{suffix}", image), (f"{key}.json", json.dumps(record).encode())]


def bomb(height=60000, width=60000):
    """A PNG of a few bytes that promises billions of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def write_tar(folder, name, members, end=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_bytes(members, end))


def write_parquet(path, rows, row_group=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)


def write_mds_folder(folder, rows, encodings):
    """An MDS folder as mosaicml-streaming writes it, by that library."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=encodings, size_limit=2000) as writer:
        for row in rows:
            writer.write(row)


def config_of(tmp_path, *sources, **settings):
    """A dataset over `sources` (kind, path[, more]) with one 32 px bucket."""
    defaults = {
        "name": "ds",
        "store": str(tmp_path / "store"),
        "buckets": BucketConfig(resolution=32, max_aspect=1.0, step=16),
        "part_rows": 4,
        "shuffle_window": 8,
        "workers": 0,
        "image_format": "png",
    }
    sources = [SourceConfig(kind=kind, path=str(path), **dict(*more)) for kind, path, *more in sources]
    return DatasetConfig(**{**defaults, "sources": sources, **settings})


def prepare(config):
    """Plan and make all pairs; the dataset."""
    dataset = open_store(config.store, create=True).sub(config.name)
    run_plan(config, dataset, ALONE)
    run_pairs(config, dataset, ALONE)
    return dataset


def all_pairs(dataset):
    kinds = read_plan(dataset).caption_kinds
    return [pair for commit in committed(dataset, PAIRS).values() for pair in read_pairs(dataset, commit, kinds)]


def reasons_of(dataset):
    """Reason -> rows, over plan and parts."""
    from data_prep.dataset.parts import read_plan_record

    found = {}
    for file in read_plan_record(dataset)["files"]:
        for reason, count in file["dropped"].items():
            found[reason] = found.get(reason, 0) + count
    for commit in committed(dataset, PAIRS).values():
        for name, count in commit.counts.items():
            if name.startswith("dropped "):
                found[name.removeprefix("dropped ")] = found.get(name.removeprefix("dropped "), 0) + int(count)
    return found
