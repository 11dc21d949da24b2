import json
import multiprocessing
import os
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.config import BucketConfig, SourceConfig
from data_prep.dataset.accounts import account
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS, Bucket, Part
from data_prep.dataset.verify import verify
from data_prep.images.images import ImageError, decode_image, resize_crop
from data_prep.pairs.make_images import CHANGED, GONE
from data_prep.pairs.pairs import read_pairs, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.sample import Place
from data_prep.store.store import StoreError, open_store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.raw_material import (
    ALONE,
    all_pairs,
    config_of,
    png,
    prepare,
    reasons_of,
    sample_members,
    smooth_image,
    write_mds_folder,
    write_parquet,
    write_tar,
)


def test_pairs_contain_the_sources_images_and_captions(tmp_path):
    for kind, first in (("t", 0), ("p", 10), ("f", 20), ("m", 30)):
        captions = [[f"{kind} {n}", f"more {n}"] for n in range(3)]
        images = [png(first + n, 40, 80) for n in range(3)]
        rows = [{"image": image, "caption": texts} for image, texts in zip(images, captions, strict=True)]
        if kind == "t":
            members = []
            for n, row in enumerate(rows):
                members += sample_members(str(n), row["image"], {"caption": row["caption"]})
            write_tar(tmp_path / "t", "a.tar", members)
        elif kind == "p":
            write_parquet(tmp_path / "p/a.parquet", rows, 2)
        elif kind == "f":
            (tmp_path / "f").mkdir()
            for n, image in enumerate(images):
                (tmp_path / f"f/{n}.png").write_bytes(image)
            lines = [json.dumps({"file_name": f"{n}.png", "caption": captions[n]}) for n in range(3)]
            (tmp_path / "f/metadata.jsonl").write_text("\n".join(lines))
        else:
            write_mds_folder(tmp_path / "m", rows, {"image": "bytes", "caption": "json"})

    config = config_of(
        tmp_path,
        ("webdataset", tmp_path / "t"),
        ("parquet", tmp_path / "p"),
        ("folder", tmp_path / "f"),
        ("mds", tmp_path / "m"),
        buckets=BucketConfig(resolution=32, max_aspect=2.0, step=8),
    )
    dataset = prepare(config)

    pairs = {pair.captions[0][1]: pair for pair in all_pairs(dataset)}
    assert sorted(pairs) == sorted(f"{kind} {n}" for kind in "tpfm" for n in range(3))
    for first, kind in zip((0, 10, 20, 30), "tpfm", strict=True):
        for n in range(3):
            pair = pairs[f"{kind} {n}"]
            assert pair.captions == [("original", f"{kind} {n}"), ("original", f"more {n}")]
            bucket = Bucket(pair.height, pair.width)
            assert bucket in (Bucket(24, 40), Bucket(24, 48))
            expected = np.asarray(resize_crop(smooth_image(first + n, 40, 80), bucket)[0])
            assert (np.asarray(decode_image(pair.image)) == expected).all()
    verify(dataset, True)


@pytest.fixture
def ten(tmp_path):
    members = []
    for n in range(10):
        members += sample_members(str(n), png(n), {"caption": f"c{n}"})
    write_tar(tmp_path / "in", "a.tar", members)
    return config_of(tmp_path, ("webdataset", tmp_path / "in"))


def test_the_tar_is_a_webdataset_and_the_table_has_the_crop(ten):
    dataset = prepare(ten)
    commit = committed(dataset, PAIRS)[Part("32x32", 0)]
    paths = {file.key.rpartition("/")[2]: dataset.local_path(file.key) for file in commit.files}
    with tarfile.open(paths["pairs.tar"]) as tar:
        names = tar.getnames()
        document = json.loads(tar.extractfile(names[1]).read())
        text = tar.extractfile(names[2]).read().decode()
    table = pq.read_table(paths["pairs.parquet"]).to_pylist()
    assert [name.partition(".")[2] for name in names] == ["png", "json", "txt"] * 4
    assert names[::3] == [row["member"] for row in table]
    assert document == {"key": table[0]["key"], "original": [table[0]["captions"][0]["text"]]}
    assert text == table[0]["captions"][0]["text"]
    assert table[0]["crop"] == [0, 0, 48, 48]
    assert (table[0]["original_height"], table[0]["height"]) == (48, 32)


def test_the_card_of_the_folder_names_every_tar(ten):
    """`datasets.load_dataset` on a folder reads the files that the front matter of its README.md names."""
    dataset = prepare(ten)
    folder = dataset.local_path("pairs")
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    (config,) = front["configs"]
    assert config["config_name"] == "default"
    named = {str(path.relative_to(folder.parent)) for path in folder.glob(config["data_files"])}
    files = [file.key for commit in committed(dataset, PAIRS).values() for file in commit.files]
    assert named == {key for key in files if key.endswith(".tar")}
    assert named

    # A store of an earlier version gets it when `pairs` is run again.
    (folder / "README.md").unlink()
    run_pairs(ten, dataset, ALONE)
    assert (folder / "README.md").exists()


def test_load_dataset_reads_the_images_without_a_builder(ten, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = prepare(ten)
    rows = datasets.load_dataset(str(dataset.local_path("pairs")), cache_dir=str(tmp_path / "cache"))["train"]
    assert sorted(rows["txt"]) == sorted(text for pair in all_pairs(dataset) for _, text in pair.captions[:1])
    assert {image.size for image in rows["png"]} == {(32, 32)}


def test_shares_meet_and_repeats_do_nothing(ten):
    dataset = open_store(ten.store, create=True).sub("ds")
    run_plan(ten, dataset, ALONE)
    run_pairs(ten, dataset, Share(0, 2))
    assert len(committed(dataset, PAIRS)) == 1
    run_pairs(ten, dataset, Share(1, 2))
    before = committed(dataset, PAIRS)
    assert set(before) == set(read_plan(dataset).parts)
    run_pairs(ten, dataset, ALONE)
    assert committed(dataset, PAIRS) == before
    assert sorted(pair.captions[0][1] for pair in all_pairs(dataset)) == [f"c{n}" for n in range(10)]


def test_worker_processes_change_nothing(ten, tmp_path):
    alone = all_pairs(prepare(ten))
    ten.workers, ten.store = 2, str(tmp_path / "other")
    assert all_pairs(prepare(ten)) == alone


def test_sources_that_changed_since_the_plan_are_dropped_with_a_reason(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(n))
        (folder / f"{n}.txt").write_text(f"c{n}")
    config = config_of(tmp_path, ("folder", folder), part_rows=1)
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(png(77))
    run_pairs(config, dataset, ALONE)
    assert reasons_of(dataset) == {GONE: 1, CHANGED: 1}
    assert sorted(pair.captions[0][1] for pair in all_pairs(dataset)) == ["c0", "c3", "c4", "c5"]
    empty = [commit for commit in committed(dataset, PAIRS).values() if not commit.rows]
    assert len(empty) == 2
    assert read_pairs(dataset, empty[0], ["original"]) == []
    (totals,) = account(dataset)
    assert (totals.written, totals.dropped_in_parts, totals.pending) == (4, 2, 0)


def test_images_that_fail_only_at_full_decode_are_dropped_in_their_part(ten, monkeypatch):
    def fail(data, bucket):
        raise ImageError("image: damaged", "late")

    monkeypatch.setattr("data_prep.pairs.make_images.fit_bucket", fail)
    dataset = prepare(ten)
    assert reasons_of(dataset) == {"image: damaged": 10}
    commit = committed(dataset, PAIRS)[Part("32x32", 0)]
    (file,) = commit.files
    assert pq.read_table(dataset.local_path(file.key)).to_pylist()[0]["detail"] == "late"


def test_damaged_parts_are_refused(ten, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    dataset = prepare(ten)
    commit = committed(dataset, PAIRS)[Part("32x32", 0)]
    path = dataset.local_path(commit.files[1].key)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"pairs\.tar"):
        read_pairs(dataset, commit, ["original"])


def test_counts_that_do_not_add_up_fail(ten, monkeypatch):
    dataset = prepare(ten)
    part, commit = next(iter(committed(dataset, PAIRS).items()))
    counts = {**commit.counts, "file 0 written": commit.counts["file 0 written"] - 1}
    dataset.put(part.commit_key(PAIRS), replace(commit, counts=counts).to_json())
    with pytest.raises(UserError, match="do not add up"):
        run_pairs(ten, dataset, ALONE)


def test_from_and_to_a_bucket(s3, ten, tmp_path):
    expected = all_pairs(prepare(ten))
    source = open_store(f"{s3}/in")
    source.put("a.tar", (tmp_path / "in/a.tar").read_bytes())
    config = config_of(tmp_path, ("webdataset", f"{s3}/in"), store=f"{s3}/out")
    assert all_pairs(prepare(config)) == expected


def crash(context, chunk):
    """Die on the number 13, like a decoder that crashes."""
    if 13 in chunk:
        os.kill(os.getpid(), signal.SIGKILL)
    return [context * number for number in chunk]


def test_a_process_that_dies_costs_one_item():
    with Workers(crash, 10, lambda item: -1, 2) as workers:
        results = list(workers.map([range(start, start + 4) for start in range(0, 24, 4)]))
    assert [n for _, numbers in results for n in numbers] == [-1 if n == 13 else 10 * n for n in range(24)]


def parquet_config(tmp_path, files=3, rows=40, row_group=8, **settings):
    """A dataset of parquet with bytes, of three aspects in turn, in small row groups."""
    sides = [(48, 48), (40, 80), (80, 40)]
    for file in range(files):
        content = [
            {"image": png(rows * file + n, *sides[n % 3]), "caption": f"{file} {n}"} for n in range(rows)
        ]
        write_parquet(tmp_path / f"p/{file}.parquet", content, row_group)
    buckets = BucketConfig(resolution=32, max_aspect=2.0, step=8)
    return config_of(tmp_path, ("parquet", tmp_path / "p"), buckets=buckets, part_rows=5, **settings)


@pytest.fixture
def groups_read(monkeypatch):
    """Row groups in the order in which they are read."""
    read = []
    real = pq.ParquetFile.iter_batches

    def counting(parquet, size, groups, *arguments, **options):
        file_bytes = parquet.metadata.row_group(0).column(0).total_compressed_size
        read.append((file_bytes, parquet.metadata.num_rows, *groups))
        return real(parquet, size, groups, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    return read


@pytest.mark.parametrize("tasks", [1, 3])
def test_row_groups_are_read_once_for_all_buckets(tmp_path, groups_read, tasks):
    config = parquet_config(tmp_path)
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    assert len(groups_read) == len(set(groups_read)) == 15
    groups_read.clear()
    for task in range(tasks):
        run_pairs(config, dataset, Share(task, tasks))
    assert len({part.bucket for part in read_plan(dataset).parts}) == 3
    assert len(set(groups_read)) == 15
    # Each bucket's parts end in another row group where one task's share ends: those groups are read twice.
    assert len(groups_read) <= 15 + (tasks - 1) * 4
    texts = sorted(pair.captions[0][1] for pair in all_pairs(dataset))
    assert texts == sorted(f"{file} {n}" for file in range(3) for n in range(40))


def test_parquet_that_changed_since_the_plan_is_dropped_with_a_reason(tmp_path):
    config = parquet_config(tmp_path, files=4, rows=8)
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    (tmp_path / "p/0.parquet").unlink()
    write_parquet(tmp_path / "p/1.parquet", [{"image": png(8), "caption": "only the first"}])
    data = bytearray((tmp_path / "p/2.parquet").read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    (tmp_path / "p/2.parquet").write_bytes(data)
    run_pairs(config, dataset, ALONE)
    lost = reasons_of(dataset)
    assert set(lost) <= {GONE, CHANGED}
    assert lost[GONE] >= 8 + 7
    texts = [pair.captions[0][1] for pair in all_pairs(dataset)]
    assert len(texts) == 32 - sum(lost.values())
    assert "1 0" in texts
    assert {f"3 {n}" for n in range(8)} <= set(texts)


def test_worker_processes_change_nothing_for_parquet(tmp_path):
    config = parquet_config(tmp_path, files=2, rows=20)
    alone = all_pairs(prepare(config))
    config.workers, config.store = 2, str(tmp_path / "other")
    assert all_pairs(prepare(config)) == alone


def _walk_large(path, peak):
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    source = ParquetSource(SourceConfig(kind="parquet", path=str(path)))
    (name,) = source.inventory().names
    samples = sum(len(sample.image) for sample in source.read(name, ["caption"]))
    walked = sum(len(image) for image in source.walk(name, (Place(0, row) for row in range(0, 4096, 3))))
    peak.value = pool.max_memory() if samples > 3 * walked - (1 << 20) > 0 else -1


def test_memory_is_that_of_pages_and_not_of_the_row_group(tmp_path):
    """Reading one row group of 134 MB, in pages of 1 MB, takes the memory of some pages."""
    images = pa.array([os.urandom(32 << 10)] * 4096, pa.binary())
    table = pa.table({"image": images, "caption": ["x"] * 4096})
    path = tmp_path / "large.parquet"
    pq.write_table(
        table, path, row_group_size=4096, use_dictionary=False, compression="none", write_batch_size=32
    )
    del table, images
    context = multiprocessing.get_context("fork")
    peak = context.Value("q", 0)
    child = context.Process(target=_walk_large, args=(path, peak))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert 0 < peak.value < 32 << 20
