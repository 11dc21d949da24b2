import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DedupeConfig, FilterConfig
from data_prep.dataset.accounts import account
from data_prep.dataset.parts import read_plan_record
from data_prep.dataset.schema import Manifest
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.listing import source_files
from data_prep.plan.plan import run_plan
from data_prep.plan.rows import dropped_key
from data_prep.plan.scan_tables import exact_hashes
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.plans import CAPTIONS, IMAGES, KINDS, content, ids_in_pairs, planned_ids, write_three_tars
from tests.helpers.raw_material import (
    ALONE,
    config_of,
    encoded,
    png,
    sample_members,
    smooth_image,
    write_parquet,
    write_tar,
)

rows = st.tuples(st.integers(0, len(IMAGES) - 1), st.sampled_from(CAPTIONS), st.none() | st.floats(0, 10))
filters = st.lists(
    st.sampled_from(
        [
            FilterConfig("min_side", 45),
            FilterConfig("caption_url"),
            FilterConfig("caption_file_name"),
            FilterConfig("min_value", 5, "score"),
            FilterConfig("expression", "score < 8 or width > height"),
        ]
    ),
    max_size=3,
)


def write_sources(folder, files):
    for number, samples in enumerate(files):
        if number % 3 == 2:
            (folder / f"f/{number}").mkdir(parents=True)
            lines = []
            for n, (image, text, score) in enumerate(samples):
                (folder / f"f/{number}/{n}.png").write_bytes(IMAGES[image])
                lines.append(json.dumps({"file_name": f"{n}.png", "caption": text, "score": score}))
            (folder / f"f/{number}/metadata.jsonl").write_text("\n".join(lines))
        elif number % 3:
            records = [
                {"image": IMAGES[image], "caption": json.dumps(text), "score": score}
                for image, text, score in samples
            ] or [{"image": IMAGES[0], "caption": "x", "score": 1.0}]
            write_parquet(folder / f"p/{number}.parquet", records)
        else:
            members = []
            for n, (image, text, score) in enumerate(samples):
                members += sample_members(str(n), IMAGES[image], {"caption": text, "score": score})
            write_tar(folder / "t", f"{number}.tar", members)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(rows, max_size=7), min_size=3, max_size=4),
    filters,
    st.booleans(),
    st.sampled_from([None, 4]),
    st.integers(1, 5),
)
def test_every_row_is_committed_or_dropped_with_a_reason(
    tmp_path_factory, files, filters, exact, near, part_rows
):
    folder = tmp_path_factory.mktemp("plan")
    write_sources(folder, files)
    config = config_of(
        folder,
        ("webdataset", folder / "t"),
        ("parquet", folder / "p"),
        ("folder", folder / "f"),
        filters=filters,
        dedupe=DedupeConfig(exact, near),
        buckets=KINDS,
        part_rows=part_rows,
    )
    dataset = open_store(config.store, create=True).sub("ds")
    manifest, refusal = None, ""
    try:
        manifest = run_plan(config, dataset, ALONE)
    except UserError as error:
        refusal = str(error)
    if manifest is None:
        assert "no pairs left" in refusal
        assert not list(dataset.list(""))
        return
    ids = planned_ids(dataset)
    assert len(set(ids)) == len(ids)
    record = read_plan_record(dataset)
    for file in source_files(dataset):
        table = pq.read_table(io.BytesIO(dataset.read(dropped_key(file.number)))).to_pylist()
        mine = [id for id in ids if id >> 32 == file.number]
        counts = record["files"][file.number]
        assert counts["rows"] == len(mine) + len(table)
        assert sorted([*mine, *(row["id"] for row in table)]) == [
            file.number << 32 | n for n in range(counts["rows"])
        ]
        assert all(row["reason"] for row in table)
    run_pairs(config, dataset, Share(0, 2))
    run_pairs(config, dataset, Share(1, 2))
    assert sorted(ids_in_pairs(dataset)) == sorted(ids)
    for file in account(dataset):
        assert (file.read, file.pending) == (file.written + file.dropped_by_plan + file.dropped_in_parts, 0)
    for bucket, parts in manifest.buckets.items():
        assert all(rows == part_rows for rows in parts[:-1]), "only a bucket's last part may be short"
        assert 1 <= parts[-1] <= part_rows, bucket


@pytest.fixture
def three_tars(tmp_path):
    write_three_tars(tmp_path / "in")
    return config_of(tmp_path, ("webdataset", tmp_path / "in"))


def test_the_plan_is_the_same_for_any_number_of_tasks(three_tars, tmp_path):
    alone = open_store(three_tars.store, create=True).sub("ds")
    run_plan(three_tars, alone, ALONE)
    shared = open_store(str(tmp_path / "other"), create=True).sub("ds")
    assert run_plan(three_tars, shared, Share(1, 2)) is None
    assert not shared.exists(Manifest.KEY)
    assert run_plan(three_tars, shared, Share(0, 2)) is not None
    assert content(alone) == content(shared)
    assert sorted(planned_ids(alone)) != planned_ids(alone), "rows are shuffled"


def test_a_killed_plan_is_resumed(three_tars, tmp_path):
    whole = open_store(three_tars.store, create=True).sub("ds")
    run_plan(three_tars, whole, ALONE)
    before = content(whole)
    for key in [*before, *whole.list("scan/")]:
        if key not in (
            "dataset.json",
            "scan/files.json",
            "scan/sources.json",
            "scan/00000001.parquet",
            "manifest/32x32/000000.parquet",
        ):
            whole.delete(key)
    run_plan(three_tars, whole, ALONE)
    assert content(whole) == before


def test_files_that_are_added_later_do_not_change_ids(three_tars, tmp_path):
    dataset = open_store(three_tars.store, create=True).sub("ds")
    run_plan(three_tars, dataset, Share(0, 2))
    write_tar(tmp_path / "in", "0a.tar", sample_members("new", png(99), {"caption": "new"}))
    run_plan(three_tars, dataset, Share(1, 2))
    assert [file.name for file in source_files(dataset)] == ["0.tar", "1.tar", "2.tar"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5),
        ("part_rows", 7),
        ("filters", [FilterConfig("min_side", 3)]),
        ("image_quality", 80),
        ("dedupe", DedupeConfig(near=2)),
    ],
)
def test_other_settings_for_one_dataset_are_refused(three_tars, key, value):
    dataset = open_store(three_tars.store, create=True).sub("ds")
    run_plan(three_tars, dataset, ALONE)
    setattr(three_tars, key, value)
    with pytest.raises(UserError, match=f"`{key}` was"):
        run_plan(three_tars, dataset, ALONE)


def test_nothing_left_leaves_nothing_behind(three_tars):
    three_tars.filters = [FilterConfig("min_side", 4000)]
    dataset = open_store(three_tars.store, create=True).sub("ds")
    with pytest.raises(UserError, match=r"no pairs left of 27 rows read: min_side: below 4000 \(27\)"):
        run_plan(three_tars, dataset, ALONE)
    assert not list(dataset.list(""))
    three_tars.filters = []
    assert run_plan(three_tars, dataset, ALONE) is not None


def test_duplicates_are_found_across_files_and_tasks(tmp_path):
    same, similar = smooth_image(1), smooth_image(1).resize((64, 64))
    for name, image in (("a", encoded(same)), ("b", encoded(same)), ("c", encoded(similar)), ("d", png(2))):
        write_tar(tmp_path / "in", f"{name}.tar", sample_members(name, image, {"caption": name}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"), dedupe=DedupeConfig(True, 6))
    dataset = open_store(config.store, create=True).sub("ds")
    for index in range(4):
        run_plan(config, dataset, Share(index, 4))
    reasons = [file["dropped"] for file in read_plan_record(dataset)["files"]]
    assert reasons == [{}, {"dedupe: same file": 1}, {"dedupe: looks the same": 1}, {}]


def test_worker_processes_change_nothing(three_tars, tmp_path):
    alone = open_store(three_tars.store, create=True).sub("ds")
    run_plan(three_tars, alone, ALONE)
    three_tars.workers = 2
    shared = open_store(str(tmp_path / "other"), create=True).sub("ds")
    run_plan(three_tars, shared, ALONE)
    assert content(alone) == content(shared)


def test_the_environment_gives_the_share(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {"ID": 7, "MIN": 5, "MAX": 8, "COUNT": 4}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert Share.from_environment() == Share(2, 4)


def test_hashes_beside_an_unreadable_image_keep_all_bits():
    hashes = [2**64 - 1, None, 2**63 + 1, 3]
    column = pa.chunked_array([pa.array(hashes[:2], pa.uint64()), pa.array(hashes[2:], pa.uint64())])
    values = exact_hashes(column)
    assert values.dtype == np.uint64
    assert values.tolist() == [2**64 - 1, 0, 2**63 + 1, 3]
