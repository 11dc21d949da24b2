"""Synthetic material of the benchmark of preparation at scale: scan tables, commits, perceptual hashes."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.fft
import xxhash
from PIL import Image

from data_prep.config import BucketConfig, DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.parts import PLAN_KEY, register_family
from data_prep.dataset.schema import PAIRS, TABLE, Commit, Family, Manifest
from data_prep.images.buckets import make_buckets
from data_prep.pairs.pairs import COLUMNS, TAR
from data_prep.plan.plan import check_settings
from data_prep.plan.rows import DROPPED, dropped_key
from data_prep.plan.scan import SCAN
from data_prep.plan.scan_tables import BATCH_ROWS, scan_key
from data_prep.store.store import Store, StoredFile, open_store
from model.common.records import seal

BILLION = 1_000_000_000
FILE_ROWS = 10_000
"""Rows of a source file, as in a tar of img2dataset."""
PART_ROWS = 1024
COMMIT_ROWS = 64
"""Rows of a part of the steps that read commits: small, so that few rows have many."""
FAMILIES = (
    Family("latents", "latents", {"model": "a"}),
    Family("llm_a", "text", {"model": "b"}),
    Family("llm_b", "text", {"model": "c"}),
)
KINDS = 1 + len(FAMILIES)
DROPPED_ROWS = 8
"""Rows of a file that the plan has dropped."""
MAX_LINKS = 50_000
"""Maximum number of hard links to a file; ext4 allows 65,000."""


def config_of(folder: Path, near: bool) -> DatasetConfig:
    """Return the settings of the synthetic dataset."""
    return DatasetConfig(
        name="ds",
        store=str(folder),
        workers=0,
        part_rows=PART_ROWS,
        buckets=BucketConfig(resolution=256, max_aspect=2.0, step=64),
        dedupe=DedupeConfig(near=3 if near else None),
        sources=[SourceConfig(path=str(folder))],
    )


def write_scan(folder: Path, rows: int, near: bool) -> None:
    """Write the scan tables of a dataset: 2 % exact duplicates, 1 % near ones, 5 % filtered."""
    config, dataset = config_of(folder, near), open_store(str(folder), create=True).sub("ds")
    check_settings(config, dataset, create=True)
    files = -(-rows // FILE_ROWS)
    write_list(dataset, files)

    rng = np.random.default_rng(0)
    buckets = np.array([bucket.name for bucket in make_buckets(config.buckets)])
    for number in range(files):
        count = min(FILE_ROWS, rows - number * FILE_ROWS)
        ids = np.arange(count) + (number << 32)
        hashes = rng.integers(1, 1 << 63, count, np.uint64)
        copies = rng.random(count) < 0.02
        hashes[copies] = rng.integers(1, 1 + rows // 20, int(copies.sum()))
        alike = rng.integers(0, 1 << 63, count, np.uint64)
        alike[rng.random(count) < 0.01] = alike[0]
        reasons = np.where(rng.random(count) < 0.05, "min_side: below 256", "")
        texts = [f"a caption of about eighty letters, as web pages have them, number {id}" for id in ids]
        captions = pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1), pa.int32()),
            pa.StructArray.from_arrays(
                [pa.array(np.zeros(count, np.uint8)), pa.array(texts)], ["kind", "text"]
            ),
        )
        columns = {
            "id": ids,
            "key": [f"{id:012x}" for id in ids],
            "reason": reasons,
            "detail": [""] * count,
            "captions": captions.cast(SCAN.field("captions").type),
            "refused": pa.array([[]] * count, SCAN.field("refused").type),
            "height": np.full(count, 512),
            "width": np.full(count, 512),
            "hash": hashes,
            "phash": alike if near else pa.nulls(count),
            "bucket": buckets[rng.integers(0, len(buckets), count)],
            "offset": np.arange(count) * 100_000,
            "length": np.full(count, 90_000),
            "path": [""] * count,
        }
        table = pa.table({name: pa.array(columns[name], SCAN.field(name).type) for name in SCAN.names})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=BATCH_ROWS, compression="zstd", write_page_checksum=True)
        dataset.put_new(scan_key(number), sink.getvalue())


class Links:
    """Files with equal bytes: hard links, without the store's fsync, which only the disk's speed shows in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[bytes, tuple[Path, int]] = {}

    def write(self, key: str, data: bytes) -> StoredFile:
        """Write a file of some bytes."""
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        first, links = self._made.get(data, (path, MAX_LINKS))
        if links < MAX_LINKS:
            os.link(first, path)
        else:
            path.write_bytes(data)
            first, links = path, 0
        self._made[data] = first, links + 1
        return StoredFile(key, len(data), xxhash.xxh64_hexdigest(data))


def pairs_payload() -> dict[str, bytes]:
    """Return the files of a part of pairs, which are the same for all parts but for their names."""
    image, table, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 40)).save(image, "JPEG")
    rows = []
    with tarfile.open(fileobj=tar, mode="w") as members:
        for id in range(COMMIT_ROWS):
            row: dict[str, Any] = dict.fromkeys(
                ("height", "width", "original_height", "original_width", "bytes"), 64
            )
            row |= {"id": id, "key": f"{id:012x}", "crop": [0.0, 0.0, 64.0, 64.0], "member": f"{id:019d}.jpg"}
            row["captions"] = [{"kind": 0, "text": f"a caption of some fifty letters, number {id}"}]
            rows.append(row)
            member = tarfile.TarInfo(row["member"])
            member.size = len(image.getvalue())
            members.addfile(member, io.BytesIO(image.getvalue()))
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), table)
    return {TABLE: table.getvalue(), TAR: tar.getvalue()}


def write_commits(folder: Path, parts: int) -> None:
    """Write the commits of a dataset's pairs and families, with small payloads."""
    dataset = open_store(str(folder), create=True).sub("ds")
    config = config_of(folder, near=False)
    check_settings(config, dataset, create=True)
    manifest = Manifest("ds", ["original"], {"256x256": [COMMIT_ROWS] * parts})
    for family in FAMILIES:
        register_family(dataset, family, None)
    rng = np.random.default_rng(0)
    files = max(1, parts * COMMIT_ROWS // FILE_ROWS)
    written: Counter[int] = Counter()
    links = Links(folder / "ds")
    payloads = {PAIRS: pairs_payload(), **{family.name: {"shard.00000.mds": b"data"} for family in FAMILIES}}
    for part in manifest.parts:
        # A part of a shuffled window has rows of some forty source files.
        counts = {f"file {file} written": 1 for file in rng.integers(0, files, 40).tolist()}
        rest = COMMIT_ROWS - sum(counts.values())
        counts["file 0 written"] = counts.get("file 0 written", 0) + rest
        written.update({int(name.split()[1]): count for name, count in counts.items()})
        attempt, ids = f"{rng.integers(0, 1 << 62):016x}", f"{rng.integers(0, 1 << 62):016x}"
        for kind in (PAIRS, *FAMILIES):
            name = kind if isinstance(kind, str) else kind.name
            stored = []
            for file, data in payloads[name].items():
                stored.append(links.write(part.payload_key(name, attempt, file), data))
            commit = Commit(
                name,
                part.bucket,
                part.number,
                COMMIT_ROWS,
                attempt,
                ids,
                stored,
                "" if isinstance(kind, str) else kind.hash,
                {"planned": COMMIT_ROWS, **counts} if name == PAIRS else {"tokens": 1000},
            )
            path = folder / "ds" / part.commit_key(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(commit.to_json())
    write_counts(dataset, links, [written[number] for number in range(files)])
    dataset.put_new(Manifest.KEY, manifest.to_json())


def write_counts(dataset: Store, links: Links, kept: list[int]) -> None:
    """Write the plan's counts of files that have some kept rows each, and the tables of the dropped ones."""
    reason = "min_side: below 256"
    rows = [
        {
            "number": number,
            "label": f"0:{number:05d}.tar",
            "rows": count + DROPPED_ROWS,
            "kept": count,
            "dropped": {reason: DROPPED_ROWS},
        }
        for number, count in enumerate(kept)
    ]
    captions: dict[str, Any] = {"kept": {"original": sum(kept)}, "letters": {"original": 1}, "refused": {}}
    dataset.put_new(PLAN_KEY, seal({"files": rows, "captions": captions, "manifest": {}}))
    write_list(dataset, len(kept))

    dropped = {"id": 0, "key": "a", "reason": reason, "detail": "", "offset": 0, "length": 0, "path": ""}
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dropped] * DROPPED_ROWS, DROPPED), table)
    for number in range(len(kept)):
        links.write(dropped_key(number), table.getvalue())


def write_list(dataset: Store, files: int) -> None:
    """Write the list of source files."""
    dataset.put_new("scan/sources.json", seal({"sources": [{"files": files, "ignored": {}}]}))
    names = [[number, 0, f"{number:05d}.tar", "v"] for number in range(files)]
    dataset.put_new("scan/files.json", seal({"files": names}))


def alike_hashes(count: int, seed: int) -> np.ndarray:
    """Return pHashes, uint64 [count], of rendered products: one to three bodies on white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)
    hashes = []
    for start in range(0, count, 2048):
        size = min(2048, count - start)
        image = np.full((size, 32, 32), 255.0, np.float32)
        bodies = rng.choice([1, 2, 3], size, p=[0.6, 0.25, 0.15])
        for body in range(3):
            center, radius = rng.normal(15.5, 2, (2, size, 1, 1)), rng.uniform(4, 13, (2, size, 1, 1))
            distance = np.hypot((y - center[0]) / radius[0], (x - center[1]) / radius[1])
            cover = np.clip((1 - distance) * radius.min(0) + 0.5, 0, 1) * (bodies > body)[:, None, None]
            image = image * (1 - cover) + cover * rng.uniform(0, 220, (size, 1, 1))
        waves = np.asarray(scipy.fft.dct(np.asarray(scipy.fft.dct(np.floor(image), axis=1)), axis=2))
        waves = waves[:, :8, :8].reshape(size, 64)
        bits = waves > np.median(waves, axis=1, keepdims=True)
        hashes.append(np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel())
    return np.concatenate(hashes)


def different_hashes(count: int, seed: int, backgrounds: int = 40) -> np.ndarray:
    """Return hashes, uint64 [count], that are near few others and agree on half of their bits with many.

    Args:
        count: number of hashes.
        seed: of the random numbers.
        backgrounds: number of values that this half has.
    """
    rng = np.random.default_rng(seed)
    shared = np.uint64(0x00FF00FF00FF00FF)
    values = rng.integers(0, 1 << 63, backgrounds, np.uint64)[rng.integers(0, backgrounds, count)]
    return (values & shared) | (rng.integers(0, 1 << 63, count, np.uint64) & ~shared)
