"""Garbage collection never wins against a commit, at whatever moment it comes and whatever the clocks say."""

import os
import time

import pytest

from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.parts import commit_part, committed_parts
from data_prep.dataset.schema import PAIRS, Manifest, Part
from data_prep.dataset.verify import verify
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, StoreError, open_store
from tests.helpers.fake_dataset import commit_pairs, plan

PART = Part("64x64", 0)
LEFT = PART.payload_key(PAIRS, "ab" * 8, "pairs.tar")
"""Payload of an attempt that was never committed."""


def planned(folder):
    """Return a dataset with a plan of one part."""
    dataset = open_store(str(folder), create=True).sub("ds")
    plan(dataset, {"64x64": [2]})
    return dataset


@pytest.fixture
def dataset(tmp_path):
    return planned(tmp_path)


@pytest.fixture
def with_remains(dataset):
    """A dataset in which a killed task left a payload."""
    dataset.put(LEFT, b"left behind")
    return dataset


class Interrupted:
    """A backend in whose `at`-th call something else happens first."""

    def __init__(self, backend, at, happen):
        self.backend, self.at, self.happen, self.calls = backend, at, happen, 0

    def __getattr__(self, name):
        method = getattr(self.backend, name)
        if not callable(method):
            return method

        def call(*arguments):
            self.calls += 1
            if self.calls == self.at:
                self.happen()
            return method(*arguments)

        return call


def interrupted(folder, at, happen):
    backend = Interrupted(LocalFolder(folder), at, happen)
    return Store(backend).sub("ds"), backend


def check(dataset):
    """Check that the part exists with its files, or not at all; return whether it does."""
    assert verify(dataset, deep=True).problems == []
    return bool(committed_parts(dataset, PAIRS))


def test_a_collector_that_comes_at_any_step_of_a_commit(tmp_path):
    outcomes = set()
    for at in range(1, 100):
        folder = tmp_path / str(at)
        dataset = planned(folder)
        writer, backend = interrupted(folder, at, lambda: collect_garbage(dataset, -1, delete=True))  # noqa: B023
        try:
            commit_pairs(writer, PART, [0, 1])
            is_made = True
        except StoreError:
            is_made = False
        assert check(dataset) == is_made
        outcomes.add(is_made)
        if backend.calls < at:
            break
    assert outcomes == {True, False}

    # The part that was overtaken is made by the next run.
    commit_pairs(dataset, PART, [0, 1])
    assert check(dataset)


def test_a_commit_that_comes_at_any_step_of_a_collector(tmp_path):
    """The writer has put its payload before; the collector finds it, and then the commit is made."""
    outcomes = set()
    for at in range(1, 100):
        folder = tmp_path / str(at)
        dataset = planned(folder)
        made = []

        def finish(dataset=dataset, made=made):
            try:
                commit_pairs(dataset, PART, [0, 1])
                made.append(True)
            except StoreError:
                made.append(False)

        collector, backend = interrupted(folder, at, finish)
        # Remains of an earlier attempt, so that there is something to collect.
        dataset.put(LEFT, b"left behind")
        collect_garbage(collector, -1, delete=True)
        if not made:
            assert backend.calls < at
            break
        assert check(dataset) == made[0]
        outcomes.add(made[0])
    assert True in outcomes


def test_the_age_is_counted_by_the_stores_clock(with_remains, monkeypatch):
    now = time.time()
    for ahead in (-2 * 86400, 2 * 86400):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now + ahead)
        assert collect_garbage(with_remains, 24, delete=True) == []
        assert collect_garbage(with_remains, -0.1) == [LEFT]
    assert abs(with_remains.now() - now) < 60


def test_keys_that_no_writer_of_ours_gives_are_left_alone(with_remains):
    folder = with_remains.local_path(LEFT).parent
    (folder / "\x1b]0;title\x07\nfake line").write_bytes(b"")
    assert collect_garbage(with_remains, -1, delete=True) == [LEFT]
    assert [path.name for path in folder.iterdir()] == ["\x1b]0;title\x07\nfake line"]


def test_the_loser_of_two_commits_leaves_no_claim(with_remains):
    os.utime(with_remains.local_path(LEFT), (0, 0))
    commit_part(with_remains, PAIRS, PART, {}, [], {})
    assert collect_garbage(with_remains, 24, delete=True) == [LEFT]
    assert sorted(with_remains.list("")) == sorted([PART.commit_key(PAIRS), Manifest.KEY])
