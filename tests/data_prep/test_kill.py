"""Preparation killed at any moment and run again ends with the same snapshot: nothing twice, nothing missing."""

import multiprocessing
import os
import random
import signal
import time

import pytest

from data_prep.parts import committed
from data_prep.schema import PAIRS
from data_prep.snapshot import collect_garbage, take_snapshot, verify
from data_prep.snapshot_reader import read_snapshot
from data_prep.store import open_store
from model.errors import UserError
from tests.data_prep.fake_dataset import FAMILIES, make_all

BUCKETS = {"64x64": [3, 2, 2], "32x96": [2, 1]}
KINDS = [PAIRS, *(family.name for family in FAMILIES)]


def prepare(uri):
    """What array tasks do, one after another."""
    os.close(2)
    os.open(os.devnull, os.O_WRONLY)
    dataset = open_store(uri).sub("ds")
    make_all(dataset, BUCKETS, nap=0.002)
    take_snapshot(dataset)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Id of the snapshot of a run that nobody disturbs, and its seconds."""
    dataset = open_store(str(tmp_path_factory.mktemp("undisturbed")), create=True).sub("ds")
    make_all(dataset, BUCKETS)
    return take_snapshot(dataset).id


def check_finished(dataset, expected):
    assert read_snapshot(dataset).id == expected == take_snapshot(dataset).id
    named = {file.key for kind in KINDS for commit in committed(dataset, kind).values() for file in commit.files}
    for delete in (False, True):
        orphans = set(collect_garbage(dataset, -1, delete))
        assert not orphans & named
    assert {key for key, _ in dataset.entries("pairs/")} | {
        key for key, _ in dataset.entries("families/") if not key.endswith("family.json")
    } == named
    assert not [key for key, _ in dataset.entries("") if "/." in key]
    found = verify(dataset, deep=True)
    assert (found.problems, found.parts) == ([], dict.fromkeys(KINDS, 5))
    return len(orphans)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("kind", "kills", "longest"), [("local", 50, 0.15), ("s3", 10, 0.8)])
def test_killed_at_random_moments_and_run_again(request, tmp_path, expected, kind, kills, longest):
    root = str(tmp_path) if kind == "local" else request.getfixturevalue("s3")
    chance = random.Random(5)
    context = multiprocessing.get_context("fork")
    killed = orphans = run = 0
    while killed < kills:
        uri = f"{root}/run{run}"
        run += 1
        dataset = open_store(uri, create=True).sub("ds")
        complete = False
        while not complete:
            # Two tasks at once on the same work, each killed at its own moment.
            children = [context.Process(target=prepare, args=(uri,)) for _ in range(2)]
            for child in children:
                child.start()
            for child in sorted(children, key=lambda _: chance.random()):
                child.join(chance.uniform(0, longest))
                if child.exitcode is None:
                    os.kill(child.pid, signal.SIGKILL)
                    child.join(10)
            codes = [child.exitcode for child in children]
            assert set(codes) <= {0, -signal.SIGKILL}
            killed += codes.count(-signal.SIGKILL)
            complete = 0 in codes
            if kind == "local":
                assert verify(dataset).problems == []
        orphans += check_finished(dataset, expected)
    assert orphans > 0, "no kill fell between a payload and its commit: the test does not test"


def test_a_snapshot_is_not_visible_before_it_is_whole(tmp_path, expected, monkeypatch):
    """Stop after every single write of `take_snapshot`: `latest` is then absent or complete."""
    uri = str(tmp_path / "store")
    dataset = open_store(uri, create=True).sub("ds")
    make_all(dataset, BUCKETS)
    for writes in range(5):
        left = iter(range(writes))
        real = type(dataset).put_new

        def put_new(store, key, data, left=left, real=real):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(store, key, data)

        monkeypatch.setattr(type(dataset), "put_new", put_new)
        try:
            take_snapshot(dataset)
            complete = True
        except KeyboardInterrupt:
            complete = False
        monkeypatch.undo()
        if complete:
            assert read_snapshot(dataset).id == expected
        else:
            with pytest.raises(UserError, match="no snapshot yet"):
                read_snapshot(dataset)
            assert verify(dataset).problems == []
    assert complete


def test_time_of_an_undisturbed_run_is_within_the_kills(tmp_path, expected):
    """Else most kills would come after the end, or before the beginning."""
    began = time.monotonic()
    uri = str(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=prepare, args=(uri,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert time.monotonic() - began > 0.02
