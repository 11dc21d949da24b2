"""Rows of which a plan drops some, and what a plan and its pairs have written."""

import io

import pyarrow.parquet as pq

from data_prep.config import BucketConfig
from data_prep.dataset.parts import committed, read_plan, read_plan_record
from data_prep.dataset.schema import PAIRS
from data_prep.plan.manifest import read_manifest
from tests.helpers.raw_material import png, sample_members, write_tar

LATE = bytearray(png(23))
LATE[-30] ^= 0xFF  # damage that only a full decode finds
IMAGES = [*map(png, range(8)), png(20, 40, 80), png(21, 80, 40), png(22, 8, 8), b"broken", b"", bytes(LATE)]
CAPTIONS = ["a fox", "see http://a.org/", "", None, ["one", "two"], "IMG_1.jpg"]
KINDS = BucketConfig(resolution=32, max_aspect=2.0, step=8)


def write_three_tars(folder):
    """Write nine pairs each; number n of file f has image 9 f + n and the caption `f n`."""
    for file in range(3):
        members = []
        for n in range(9):
            members += sample_members(f"{n}", png(9 * file + n), {"caption": f"{file} {n}"})
        write_tar(folder, f"{file}.tar", members)


def content(dataset):
    return {key: dataset.read(key) for key in dataset.list("") if not key.startswith("scan/")}


def planned_ids(dataset):
    ids, hashes = [], read_plan_record(dataset)["manifest"]
    for part in read_plan(dataset).parts:
        ids += read_manifest(dataset, part, hashes)["id"].to_pylist()
    return ids


def ids_in_pairs(dataset):
    """Return the ids in the tables of the pairs, in the order of the parts."""
    ids = []
    for commit in committed(dataset, PAIRS).values():
        for file in commit.files:
            if file.key.endswith(".parquet"):
                ids += pq.read_table(io.BytesIO(dataset.read(file.key)))["id"].to_pylist()
    return ids
