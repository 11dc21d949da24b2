"""Two plans of one dataset at once: both succeed with the same bytes, or each ends in one line."""

import pytest

from data_prep.config import FilterConfig
from data_prep.plan.plan import run_plan
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from tests.helpers.plans import content
from tests.helpers.raw_material import ALONE, config_of, png, sample_members, write_tar

NOTHING = [FilterConfig("min_side", 4000)]


class Interrupted(LocalFolder):
    """A folder in which something happens right before one of the calls."""

    def __init__(self, root, number, event):
        super().__init__(root)
        self.left, self.event = number, event

    def count(self):
        self.left -= 1
        if self.left == 0:
            self.event()

    def read(self, key, max_bytes=None):
        self.count()
        return super().read(key, max_bytes)

    def size(self, key):
        self.count()
        return super().size(key)

    def entries(self, prefix):
        self.count()
        return super().entries(prefix)

    def put_new(self, key, data):
        self.count()
        return super().put_new(key, data)

    def delete(self, key):
        self.count()
        super().delete(key)


@pytest.fixture
def two_tars(tmp_path):
    for file in range(2):
        members = sample_members("0", png(file), {"caption": "one"})
        write_tar(tmp_path / "in", f"{file}.tar", [*members, *sample_members("1", b"", {"caption": "two"})])
    return config_of(tmp_path, ("webdataset", tmp_path / "in"))


def outcome(config, dataset):
    """Return the plan, or the line with which it ended."""
    try:
        return run_plan(config, dataset, ALONE)
    except UserError as error:
        return str(error)


def race(config, tmp_path, number):
    """Run a plan, and another one right before its call `number` of the store.

    Returns:
        The outcomes of both, and the dataset. The other one is None if there were fewer calls.
    """
    folder = tmp_path / f"store{number}"
    dataset = open_store(str(folder), create=True).sub("ds")
    other = []
    backend = Interrupted(folder, number, lambda: other.append(outcome(config, dataset)))
    first = outcome(config, Store(backend, "ds/"))
    return first, other[0] if other else None, dataset


def test_two_plans_make_the_same_plan_wherever_they_meet(two_tars, tmp_path):
    alone = open_store(two_tars.store, create=True).sub("ds")
    plan = run_plan(two_tars, alone, ALONE)
    expected, number = content(alone), 0
    other = plan
    while other is not None:
        number += 1
        first, other, dataset = race(two_tars, tmp_path, number)
        assert (first, other) in ((plan, plan), (plan, None)), number
        assert content(dataset) == expected
    assert number > 20


def test_two_plans_without_pairs_end_in_one_line_and_leave_nothing_wherever_they_meet(two_tars, tmp_path):
    two_tars.filters = NOTHING
    endings, number, other = set(), 0, ""
    while other is not None:
        number += 1
        first, other, dataset = race(two_tars, tmp_path, number)
        assert other is None or "no pairs left of 4 rows read" in other, number
        assert "no pairs left" in first, number
        assert first.isprintable()
        assert not list(dataset.list("")), f"left behind by call {number}, for the next settings to find"
        endings.add("does not exist any more" in first)
    assert number > 20
    assert endings == {True, False}
