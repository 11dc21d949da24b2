"""A snapshot is complete or says what is missing; its id depends on its content; garbage is what nothing
names."""

import os
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import array_list, commit_part, committed, read_commit, read_plan
from data_prep.dataset.schema import PAIRS, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import read_index, read_snapshot
from data_prep.dataset.verify import verify
from data_prep.families.encode import SHARD
from data_prep.store.store import StoreError, open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.fake_dataset import (
    FAMILIES,
    commit_pairs,
    make_all,
    make_families,
    make_pairs,
    plan,
    sample_ids,
)

BUCKETS = {"64x64": [3, 3, 2], "32x96": [2]}


@pytest.fixture
def dataset(store):
    dataset = store.sub("ds")
    make_all(dataset, BUCKETS)
    return dataset


def test_a_snapshot_names_every_row_once(dataset, tmp_path):
    snapshot = take_snapshot(dataset)
    assert snapshot == read_snapshot(dataset, "latest") == read_snapshot(dataset, snapshot.id)
    assert {name: bucket["rows"] for name, bucket in snapshot.buckets.items()} == {"64x64": 8, "32x96": 2}
    assert (snapshot.left_out, snapshot.caption_kinds) == ({}, ["original"])
    for name, parts in BUCKETS.items():
        rows = read_index(dataset, snapshot, name).to_pylist()
        assert [(row["number"], row["rows"]) for row in rows] == list(enumerate(parts))
        for row in rows:
            for family in FAMILIES:
                (file,) = read_commit(dataset, family.name, Part(name, row["number"])).files
                assert (row[f"{family.name}.key"], row[f"{family.name}.bytes"]) == (file.key, file.bytes)
                dataset.fetch(file, tmp_path / "payload")


def test_the_same_content_has_the_same_id_and_other_content_another(dataset, tmp_path):
    snapshot = take_snapshot(dataset)
    assert take_snapshot(dataset) == snapshot
    other = open_store(str(tmp_path / "other"), create=True).sub("ds")
    plan(other, BUCKETS)
    for index in (2, 0, 1):
        make_pairs(other, Share(index, 3))
    make_families(other)
    assert take_snapshot(other).id == snapshot.id
    part = Part("64x64", 1)
    other.delete(part.commit_key("latents"))
    rows = [{"id": id, "mean": b"other", "std": b"numbers"} for id in sample_ids(other, part)]
    write_mds(tmp_path / SHARD, FAMILIES[0].columns, rows)
    commit_part(
        other, "latents", part, {SHARD: tmp_path / SHARD}, [row["id"] for row in rows], {}, FAMILIES[0].hash
    )
    assert take_snapshot(other).id != snapshot.id
    assert take_snapshot(dataset, ["llm"]).id != snapshot.id


def test_latest_is_the_one_taken_last(dataset):
    assert read_snapshot_error(dataset, "latest").startswith(f"{dataset.uri}: no snapshot yet")
    both, one = take_snapshot(dataset), take_snapshot(dataset, ["llm"])
    assert read_snapshot(dataset) == one
    assert take_snapshot(dataset) == both == read_snapshot(dataset)
    history = list(dataset.list("snapshots/history/"))
    take_snapshot(dataset)
    assert list(dataset.list("snapshots/history/")) == history
    assert both.id in read_snapshot_error(dataset, "0123456789abcdef")


def read_snapshot_error(dataset, id):
    with pytest.raises(UserError) as error:
        read_snapshot(dataset, id)
    return str(error.value)


def test_missing_parts_are_listed_as_an_array(dataset):
    for number in (0, 2):
        dataset.delete(Part("64x64", number).commit_key("llm"))
    hint = r"llm: 2 of 4: `LI_DIT_TASKS=4 sbatch --array=0,3 cluster/encode\.sh"
    with pytest.raises(UserError, match=hint) as error:
        take_snapshot(dataset)
    assert "latents:" not in str(error.value)
    assert not list(dataset.list("snapshots/"))
    # The tasks of that list make exactly the missing parts.
    for task in (0, 3):
        make_families(dataset, Share(task, 4))
    assert take_snapshot(dataset).left_out == {}


@given(st.sets(st.integers(0, 60)))
def test_array_lists_name_their_numbers(numbers):
    listed = set()
    for run in filter(None, array_list(numbers).split(",")):
        low, _, high = run.partition("-")
        listed |= set(range(int(low), int(high or low) + 1))
    assert listed == numbers


def test_a_partial_snapshot_counts_what_it_leaves_out(dataset):
    complete = take_snapshot(dataset)
    dataset.delete(Part("64x64", 1).commit_key("llm"))
    dataset.delete(Part("32x96", 0).commit_key(PAIRS))
    dataset.delete(Part("32x96", 0).commit_key("llm"))
    dataset.delete(Part("32x96", 0).commit_key("latents"))
    snapshot = take_snapshot(dataset, partial=True)
    assert snapshot.left_out == {"no llm yet": 3, "no pairs yet": 2}
    assert {name: bucket["parts"] for name, bucket in snapshot.buckets.items()} == {"64x64": 2}
    assert snapshot.id != complete.id


def test_rows_lost_at_decoding_are_lost_in_all_families(store):
    dataset = store.sub("ds")
    plan(dataset, {"64x64": [2, 2, 1]})
    make_pairs(dataset, drop={0, 1, 3})
    make_families(dataset)
    snapshot = take_snapshot(dataset)
    assert snapshot.buckets["64x64"]["rows"] == 2
    assert read_index(dataset, snapshot, "64x64")["number"].to_pylist() == [1, 2]
    assert verify(dataset, deep=True).problems == []


def test_parts_that_do_not_fit_together_are_refused(dataset, tmp_path):
    part = Part("32x96", 0)
    dataset.delete(part.commit_key("llm"))
    dataset.delete(part.commit_key(PAIRS))
    with pytest.raises(UserError, match=r"commits/latents/32x96/00000\.json: holds other samples"):
        take_snapshot(dataset)
    commit_pairs(dataset, part, [99])
    with pytest.raises(UserError, match=r"commits/latents/32x96/00000\.json: holds other samples"):
        take_snapshot(dataset, partial=True)
    with pytest.raises(UserError, match="no family `none`"):
        take_snapshot(dataset, ["none"])
    assert not list(dataset.list("snapshots/"))


def test_a_dataset_without_families_or_rows_is_refused(store):
    dataset = store.sub("ds")
    with pytest.raises(UserError, match="plan"):
        take_snapshot(dataset)
    plan(dataset, {"64x64": [1]})
    with pytest.raises(UserError, match="no families"):
        take_snapshot(dataset)
    make_pairs(dataset, drop={0})
    make_families(dataset)
    with pytest.raises(UserError, match="nothing to train on"):
        take_snapshot(dataset)


def test_damaged_records_and_indexes_are_refused(dataset):
    snapshot = take_snapshot(dataset)
    key = snapshot.index_key("64x64")
    index = dataset.read(key)
    dataset.put(key, index[:-1])
    with pytest.raises(StoreError, match="damaged"):
        read_index(dataset, snapshot, "64x64")
    assert any("damaged" in problem for problem in verify(dataset).problems)
    with pytest.raises(StoreError, match="damaged"):
        collect_garbage(dataset, 0)
    dataset.put(key, index)
    dataset.put(snapshot.key, snapshot.to_json().replace(b'"rows":8', b'"rows":9'))
    with pytest.raises(StoreError, match="damaged"):
        read_snapshot(dataset)


def test_verify_finds_what_is_wrong_and_says_what_to_do(dataset):
    snapshot = take_snapshot(dataset)
    result = verify(dataset, deep=True)
    assert result.problems == []
    assert (result.parts, result.snapshots) == ({PAIRS: 4, "latents": 4, "llm": 4}, 1)
    (flipped,) = read_commit(dataset, "llm", Part("64x64", 0)).files
    data = dataset.read(flipped.key)
    dataset.put(flipped.key, data[:-1] + bytes([data[-1] ^ 1]))
    (cut,) = read_commit(dataset, "latents", Part("64x64", 1)).files
    dataset.put(cut.key, dataset.read(cut.key)[:-1])
    missing = read_commit(dataset, PAIRS, Part("32x96", 0)).files[0]
    dataset.delete(missing.key)
    shallow = [problem for problem in verify(dataset).problems if "snapshot" not in problem]
    assert [re.search(r"commits/(\S+)\.json.*delete this commit", problem)[1] for problem in shallow] == [
        "pairs/32x96/00000",
        "latents/64x64/00001",
    ]
    deep = [problem for problem in verify(dataset, deep=True).problems if "snapshot" not in problem]
    assert any(flipped.key in problem for problem in deep)
    assert len(deep) == 3
    # The remedy that the messages name: the same bytes under other keys are the same snapshot.
    for kind, part in (("llm", Part("64x64", 0)), ("latents", Part("64x64", 1)), (PAIRS, Part("32x96", 0))):
        dataset.delete(part.commit_key(kind))
    make_pairs(dataset)
    make_families(dataset)
    assert take_snapshot(dataset).id == snapshot.id
    assert verify(dataset, deep=True).problems == []
    # A run that reads the older record still finds its index.
    read_index(dataset, snapshot, "64x64")
    collect_garbage(dataset, -1, delete=True)
    read_index(dataset, snapshot, "64x64")
    assert verify(dataset, deep=True).problems == []


def orphan(dataset, key):
    dataset.put(key, b"orphan")
    return key


def test_garbage_is_what_nothing_names_and_only_when_it_is_old(dataset):
    take_snapshot(dataset)
    before = set(dataset.list(""))
    orphans = {
        orphan(dataset, Part("64x64", 0).payload_key(PAIRS, "00" * 8, "pairs.tar")),
        orphan(dataset, Part("64x64", 0).payload_key("llm", "ab" * 8, SHARD)),
        orphan(dataset, f"families/llm/constants-{'0' * 16}.safetensors"),
        orphan(dataset, f"snapshots/{'0' * 16}/64x64-{'0' * 16}.parquet"),
    }
    dataset.put("manifest/64x64.parquet", b"not part of the layout")
    dataset.put("notes.txt", b"neither")
    assert collect_garbage(dataset, 24, delete=True) == []
    assert set(collect_garbage(dataset, -1)) == orphans
    assert orphans < set(dataset.list(""))
    assert set(collect_garbage(dataset, -1, delete=True)) == orphans
    assert set(dataset.list("")) == before | {"manifest/64x64.parquet", "notes.txt"}
    assert verify(dataset, deep=True).problems == []
    assert collect_garbage(dataset, -1) == []


def test_an_attempt_that_still_writes_is_not_garbage(tmp_path):
    dataset = open_store(str(tmp_path)).sub("ds")
    old = dataset.local_path(orphan(dataset, Part("64x64", 0).payload_key(PAIRS, "ab" * 8, "pairs.tar")))
    os.utime(old, (time.time() - 1e6,) * 2)
    assert len(collect_garbage(dataset, 24)) == 1
    orphan(dataset, Part("64x64", 0).payload_key(PAIRS, "ab" * 8, "pairs.parquet"))
    assert collect_garbage(dataset, 24) == []
    temporary = dataset.local_path("commits/x").with_name(".tmp-0")
    temporary.parent.mkdir()
    temporary.write_bytes(b"half of a commi")
    os.utime(temporary, (time.time() - 1e6,) * 2)
    assert collect_garbage(dataset, 24, delete=True) == ["commits/.tmp-0"]
    assert not temporary.parent.exists()


def test_payloads_of_a_snapshot_are_kept_even_without_their_commits(dataset):
    take_snapshot(dataset)
    payloads = set()
    for kind in ("latents", "llm"):
        for commit in committed(dataset, kind).values():
            payloads |= {file.key for file in commit.files}
        for part in read_plan(dataset).parts:
            dataset.delete(part.commit_key(kind))
    collect_garbage(dataset, -1, delete=True)
    assert payloads <= set(dataset.list("families/"))
