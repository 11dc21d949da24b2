"""Roll-ups of commits: lost, stale or damaged, they change no result; intact, they save the requests."""

import random

import pytest

from data_prep.dataset import rollups
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.parts import commits_of_share, committed, read_commit
from data_prep.dataset.rollups import write_committed
from data_prep.dataset.schema import PAIRS, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.store.faults import StoreError
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.test_requests import counted
from tests.helpers.fake_dataset import FAMILIES, commit_pairs, make_all, make_pairs, plan, sample_ids

BUCKETS = {"64x64": [2] * 7 + [1], "32x96": [3, 2]}
KINDS = [PAIRS, *(family.name for family in FAMILIES)]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(rollups, "MIN_ROWS", 1)
    monkeypatch.setattr(rollups, "MAX_ROWS", 3)


@pytest.fixture
def dataset(store):
    dataset = store.sub("ds")
    make_all(dataset, BUCKETS)
    return dataset


def truth(dataset):
    """Return all commits, each read by itself."""
    prefix = "commits/"
    keys = [key.removeprefix(prefix).removesuffix(".json").split("/") for key in dataset.list(prefix)]
    parts = [(kind, Part(bucket, int(number))) for kind, bucket, number in keys]
    return {(kind, part): read_commit(dataset, kind, part) for kind, part in parts}


def seen(dataset):
    """Return all commits as readers of many see them."""
    return {(kind, part): commit for kind in KINDS for part, commit in committed(dataset, kind).items()}


def test_whatever_happens_to_roll_ups_and_commits_readers_see_the_commits(dataset):
    chance = random.Random(3)
    assert seen(dataset) == truth(dataset)
    for step in range(5):
        keys = list(dataset.list("rollups/"))
        assert keys
        for key in chance.sample(keys, len(keys) // 2):
            data = dataset.read(key)
            chance.choice(
                [
                    lambda key=key: dataset.delete(key),
                    lambda key=key, data=data: dataset.put(key, data[: len(data) // 2]),
                    lambda key=key, data=data: dataset.put(key, data[:40] + b"?" + data[41:]),
                    lambda key=key, data=data: dataset.put(key.replace("llm", PAIRS), data),
                    lambda: dataset.put(f"rollups/{PAIRS}/notes.txt", b"not one"),
                ]
            )()
        part = Part("64x64", chance.randrange(7))
        dataset.delete(part.commit_key(PAIRS))
        if step % 3:
            commit_pairs(dataset, part, sample_ids(dataset, part)[step % 2 :])
        assert seen(dataset) == truth(dataset), step


def test_snapshots_and_gc_are_the_same_without_roll_ups(dataset):
    with_them = take_snapshot(dataset)
    for key in list(dataset.list("rollups/")):
        dataset.delete(key)
    assert take_snapshot(dataset) == with_them
    dataset.put(f"pairs/64x64/00000/{'a' * 16}/pairs.tar", b"an orphan")
    assert collect_garbage(dataset, -1, delete=True) == [f"pairs/64x64/00000/{'a' * 16}/pairs.tar"]
    assert verify(dataset, deep=True).problems == []
    assert not list(dataset.list(f"pairs/64x64/00000/{'a' * 16}/"))


@pytest.mark.parametrize("rows", [3, 64])
def test_many_small_ones_become_one_and_gc_removes_those_of_no_use(store, proxy, monkeypatch, rows):
    monkeypatch.setattr(rollups, "MAX_ROWS", rows)
    monkeypatch.setattr(rollups, "MERGE_FILES", 4)
    dataset = store.sub("ds")
    plan(dataset, BUCKETS)
    for index in range(10):
        make_pairs(dataset, Share(index, 10))
        write_committed(dataset, PAIRS, commits_of_share(dataset, PAIRS, Share(index, 10)))
    folder = f"rollups/{PAIRS}/"
    small = set(dataset.list(folder))
    assert len(small) == 10

    expected = truth(dataset)
    assert collect_garbage(dataset, -1) == []
    merged = set(dataset.list(folder)) - small
    if rows == 64:
        # one object has all, and the others are not read any more
        assert len(merged) == 1
        reads = counted(proxy, committed, dataset, PAIRS)
        assert not reads or reads == {"LIST": 2, "GET": 1 + rollups.READERS}
        assert set(collect_garbage(dataset, -1)) == small
    assert collect_garbage(dataset, 24) == []
    chance = random.Random(rows)
    for _ in range(4):
        garbage = collect_garbage(dataset, -1, delete=True)
        assert all(key.startswith(folder) for key in garbage)
        for key in list(dataset.list(folder))[:1]:
            chance.choice([dataset.delete, lambda key: dataset.put(key, b"damaged")])(key)
        assert seen(dataset) == expected

    # those of commits that were made again are of no use, and go
    for part in committed(dataset, PAIRS):
        dataset.delete(part.commit_key(PAIRS))
        commit_pairs(dataset, part, sample_ids(dataset, part))
    stale = set(dataset.list(folder))
    assert stale <= set(collect_garbage(dataset, -1, delete=True))
    assert seen(dataset) == truth(dataset)
    assert not stale & set(dataset.list(folder))


def test_a_damaged_commit_is_named_although_a_roll_up_has_it(dataset):
    committed(dataset, PAIRS)
    key = Part("64x64", 3).commit_key(PAIRS)
    data = dataset.read(key)
    dataset.put(key, data.replace(b"rows", b"cows"))
    with pytest.raises(StoreError, match=r"commits/pairs/64x64/00003\.json: damaged"):
        committed(dataset, PAIRS)


def test_many_commits_are_a_listing_and_a_few_requests(s3, proxy):
    dataset = open_store(s3).sub("ds")
    make_all(dataset, BUCKETS)
    committed(dataset, PAIRS)
    files = len(list(dataset.list(f"rollups/{PAIRS}/")))
    assert counted(proxy, committed, dataset, PAIRS) == {"LIST": 2, "GET": files}
    # Tasks that encode write theirs without a request to find out what they committed.
    written = len(list(dataset.list("rollups/latents/")))
    assert written == -(-sum(map(len, BUCKETS.values())) // rollups.MAX_ROWS)
    assert counted(proxy, committed, dataset, "latents") == {"LIST": 2, "GET": written}


class ReadOnly(LocalFolder):
    def put_new(self, key, data):
        raise UserError("no rights to write")


def test_a_store_that_cannot_be_written_to_can_be_read(tmp_path):
    dataset = open_store(str(tmp_path), create=True).sub("ds")
    make_all(dataset, BUCKETS)
    assert committed(Store(ReadOnly(tmp_path), "ds/"), PAIRS) == committed(dataset, PAIRS)


def test_the_tasks_of_verify_find_what_one_finds(dataset):
    take_snapshot(dataset)
    commit = read_commit(dataset, "latents", Part("64x64", 2))
    dataset.delete(commit.files[0].key)
    pairs = read_commit(dataset, PAIRS, Part("32x96", 1))
    dataset.put(pairs.files[0].key, b"short")
    dataset.put(Part("64x64", 5).commit_key("llm"), b"damaged")
    for deep in (False, True):
        alone = verify(dataset, deep)
        shares = [verify(dataset, deep, Share(index, 4)) for index in range(4)]
        assert sorted(alone.problems) == sorted(problem for share in shares for problem in share.problems)
        assert len(alone.problems) >= 4
        for kind in KINDS:
            assert alone.parts[kind] == sum(share.parts[kind] for share in shares)
            assert alone.bytes[kind] == sum(share.bytes[kind] for share in shares)
