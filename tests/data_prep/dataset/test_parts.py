"""Exactly one writer commits a part, the commit never changes, and a family's name has one encoding."""

import multiprocessing
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dataset.parts import (
    commit_part,
    committed,
    committed_parts,
    hash_ids,
    read_commit,
    read_plan,
    register_family,
)
from data_prep.dataset.schema import Commit, Family, Manifest, Part
from data_prep.dataset.snapshot_reader import read_constants, read_families, read_family
from data_prep.store.store import StoreError, open_store
from model.common.errors import UserError

PART = Part("64x64", 7)


@given(st.lists(st.integers(0, 2**63 - 1), max_size=9), st.lists(st.integers(0, 2**63 - 1), max_size=9))
def test_the_hash_of_ids_distinguishes_lists(one, other):
    assert (hash_ids(one) == hash_ids(other)) == (one == other)


def write(tmp_path, data):
    path = tmp_path / f"{data.hex()}.bin"
    path.write_bytes(data)
    return path


def test_a_commit_names_a_payload_that_exists(store, tmp_path):
    files = {"shard.00000.mds": write(tmp_path, b"one"), "more.bin": write(tmp_path, b"two")}
    commit = commit_part(store, "latents", PART, files, [4, 5], {"tokens": 3.0}, "hash")
    assert read_commit(store, "latents", PART) == commit == committed(store, "latents")[PART]
    assert Commit.from_json(commit.to_json()) == commit
    assert [store.read(file.key) for file in commit.files] == [b"two", b"one"]
    assert (commit.rows, commit.ids_xxh64, commit.counts) == (2, hash_ids([4, 5]), {"tokens": 3.0})
    with pytest.raises(FileNotFoundError):
        read_commit(store, "latents", Part("64x64", 8))


def test_the_second_writer_gets_the_firsts_commit_and_leaves_nothing(store, tmp_path, monkeypatch):
    first = commit_part(store, "llm", PART, {"s": write(tmp_path, b"one")}, [1], {}, "h")
    assert commit_part(store, "llm", PART, {"s": write(tmp_path, b"two")}, [1], {}, "h") == first
    before = list(store.list(""))
    # This writer looked before the first one had committed.
    monkeypatch.setattr(store, "exists", lambda key: "commits/" not in key)
    assert commit_part(store, "llm", PART, {"s": write(tmp_path, b"two")}, [1], {}, "h") == first
    assert list(store.list("")) == before


def test_other_samples_under_a_committed_part_are_an_error(store, tmp_path):
    commit_part(store, "llm", PART, {"s": write(tmp_path, b"one")}, [1, 2], {}, "h")
    for ids, family in (([1, 3], "h"), ([1, 2], "other")):
        with pytest.raises(UserError, match="64x64/00007"):
            commit_part(store, "llm", PART, {"s": write(tmp_path, b"two")}, ids, {}, family)


def test_foreign_and_damaged_records_are_named(store, tmp_path):
    commit_part(store, "llm", PART, {}, [], {})
    store.put("commits/llm/64x64/00008.json", store.read("commits/llm/64x64/00007.json"))
    with pytest.raises(StoreError, match=r"00008\.json"):
        committed(store, "llm")
    store.put("commits/llm/64x64/00008.json", b"{}")
    with pytest.raises(StoreError, match=r"00008\.json"):
        committed(store, "llm")
    store.put("commits/llm/64x64/notes.txt", b"")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        committed_parts(store, "llm")


def test_no_plan_is_an_error_of_one_line(store):
    with pytest.raises(UserError, match="plan"):
        read_plan(store)
    store.put_new(Manifest.KEY, Manifest("ds", ["a"], {"b": [2, 1], "a": [1]}).to_json())
    assert read_plan(store).parts == [Part("b", 0), Part("a", 0), Part("b", 1)]


def test_families_register_once(store):
    family = Family("llm", "text", {"model": "m", "layer": 3, "mean": [0.5]}, {"width": 2})
    constants = {"mean": torch.randn(4), "null_ids": torch.arange(3)}
    stored = register_family(store, family, constants)
    assert stored.hash == family.hash
    assert all(torch.equal(tensor, constants[name]) for name, tensor in read_constants(store, stored).items())
    assert register_family(store, family, {"mean": torch.randn(4)}) == stored == read_family(store, "llm")
    assert read_families(store) == {"llm": stored}
    with pytest.raises(UserError, match=r"layer: stored 3, now 4"):
        register_family(
            store, Family("llm", "text", {"model": "m", "layer": 4, "mean": [0.5]}, {"width": 2}), None
        )
    for name in ("pairs", "a/b", "", "../x", ".x"):
        with pytest.raises(UserError, match="family name"):
            register_family(store, Family(name, "text", {}), None)
    with pytest.raises(UserError, match="llm"):
        read_family(store, "other")
    store.put(stored.constants_key, store.read(stored.constants_key)[:-1] + b"x")
    with pytest.raises(StoreError, match="constants"):
        read_constants(store, stored)


def test_constants_of_a_losing_writer_are_not_used(store, monkeypatch):
    family = Family("llm", "text", {"model": "m"})
    stored = register_family(store, family, {"mean": torch.zeros(2)})
    monkeypatch.setattr(store, "exists", lambda key: False)
    assert register_family(store, family, {"mean": torch.ones(2)}) == stored
    assert torch.equal(read_constants(store, stored)["mean"], torch.zeros(2))


def _race(uri, start, number, folder, results):
    store = open_store(uri)
    path = folder / f"payload-{number}"
    time.sleep(max(0, start - time.time()))
    for part in range(6):
        path.write_bytes(b"by %d of part %d " % (number, part) * 100)
        commit = commit_part(store, "llm", Part("64x64", part), {"s": path}, [part], {"by": number}, "h")
        results.put((number, part, commit.attempt))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("writers", [2, 8])
def test_processes_that_race_make_one_commit_per_part(store, store_uri, tmp_path, writers):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    start = time.time() + 0.5
    arguments = [(store_uri, start, number, tmp_path, results) for number in range(writers)]
    children = [context.Process(target=_race, args=case) for case in arguments]
    for child in children:
        child.start()
    seen = [results.get(timeout=60) for _ in range(6 * writers)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * writers
    commits = committed(store, "llm")
    assert sorted(commits) == [Part("64x64", part) for part in range(6)]
    for _, part, attempt in seen:
        assert commits[Part("64x64", part)].attempt == attempt
    for part, commit in commits.items():
        data = store.read(commit.files[0].key)
        assert data == b"by %d of part %d " % (commit.counts["by"], part.number) * 100
    assert len(list(store.list("families/"))) == 6
