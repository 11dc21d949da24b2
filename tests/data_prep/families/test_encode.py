"""A family gets every part of the pairs once, in their order, however the tasks share them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import committed, committed_parts, read_plan, register_family
from data_prep.dataset.schema import PAIRS, Part
from data_prep.families.encode import encode_family
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.fake_dataset import ALONE, FAMILIES, encoder, make_families, make_pairs, plan, sample_ids


@pytest.fixture
def dataset(store):
    dataset = store.sub("ds")
    plan(dataset, {"64x64": [3, 3, 1], "32x96": [2]})
    make_pairs(dataset)
    return dataset


def rows_of(dataset, family, tmp_path):
    rows = {}
    for part, commit in committed(dataset, family.name).items():
        for file in commit.files:
            dataset.fetch(file, tmp_path / "shard")
            rows[part] = list(Shard(tmp_path / "shard", family.columns))
    return rows


def test_rows_are_those_of_the_pairs_in_order(dataset, tmp_path):
    make_families(dataset)
    for family in FAMILIES:
        ids = {}
        for part, rows in rows_of(dataset, family, tmp_path).items():
            ids[part] = [row["id"] for row in rows]
        assert ids == {part: sample_ids(dataset, part) for part in read_plan(dataset).parts}

        for part, commit in committed(dataset, family.name).items():
            pairs = committed(dataset, PAIRS)[part]
            expected = (pairs.rows, pairs.ids_xxh64, family.hash)
            assert (commit.rows, commit.ids_xxh64, commit.family_hash) == expected


def test_running_again_does_only_what_is_missing(dataset):
    family = register_family(dataset, FAMILIES[0], None)
    calls = []

    def counting(pairs):
        calls.append(pairs[0].id)
        return encoder(family)(pairs)

    encode_family(dataset, family, counting, ALONE)
    encode_family(dataset, family, counting, ALONE)
    assert len(calls) == 4
    dataset.delete(Part("64x64", 1).commit_key(family.name))
    encode_family(dataset, family, counting, ALONE)
    assert calls[4:] == sample_ids(dataset, Part("64x64", 1))[:1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 2), min_size=1, max_size=5))
def test_shares_together_make_everything(tmp_path_factory, count, rows):
    dataset = open_store(str(tmp_path_factory.mktemp("store"))).sub("ds")
    plan(dataset, {"64x64": rows})
    for index in range(count):
        make_pairs(dataset, Share(index, count))
    for index in reversed(range(count)):
        make_families(dataset, Share(index, count))
    for family in FAMILIES:
        assert committed_parts(dataset, family.name) == set(read_plan(dataset).parts)


def test_parts_that_lost_all_rows_are_committed_empty(store):
    dataset = store.sub("ds")
    plan(dataset, {"64x64": [2, 2]})
    make_pairs(dataset, drop={0, 1})
    make_families(dataset)
    commit = committed(dataset, "llm")[Part("64x64", 0)]
    assert (commit.rows, commit.files) == (0, [])


def test_parts_without_pairs_are_named_after_the_others_are_done(store):
    dataset = store.sub("ds")
    plan(dataset, {"64x64": [1, 1, 1]})
    make_pairs(dataset, Share(1, 2))
    with pytest.raises(UserError, match=r"1 of 3 parts.*64x64/00000"):
        make_families(dataset)
    assert len(committed_parts(dataset, FAMILIES[0].name)) == 2


def test_an_encoder_that_fails_or_returns_other_rows_commits_nothing(dataset):
    family = register_family(dataset, FAMILIES[0], None)

    def failing(pairs):
        raise RuntimeError("CUDA out of memory")

    def swapping(pairs):
        rows, counts = encoder(family)(pairs)
        return rows[::-1], counts

    def losing(pairs):
        rows, counts = encoder(family)(pairs)
        return rows[1:], counts

    for wrong in (failing, losing, swapping):
        with pytest.raises((RuntimeError, ValueError)):
            encode_family(dataset, family, wrong, Share(1, 4))
    assert committed_parts(dataset, family.name) == set()


def test_an_unregistered_family_is_refused(dataset):
    with pytest.raises(UserError, match="latents"):
        encode_family(dataset, FAMILIES[0], encoder(FAMILIES[0]), ALONE)
