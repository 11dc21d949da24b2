"""Shares of the work: every item has one owner; a task reads its share from Slurm or the command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.common.errors import UserError
from model.common.share import Share


@given(st.lists(st.integers(), max_size=50), st.integers(1, 20))
def test_shares_cover_everything_once(items, count):
    owned = [Share(index, count).owns(items) for index in range(count)]
    assert sorted(item for share in owned for item in share) == sorted(items)
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    owners = [task for task, share in enumerate(owned) for _ in share]
    assert owners == [Share.owner(item, len(items), count) for item in range(len(items))]


def array(monkeypatch, task, low, high, count, tasks=None):
    for name, value in {"ID": task, "MIN": low, "MAX": high, "COUNT": count}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    if tasks:
        monkeypatch.setenv("LI_DIT_TASKS", str(tasks))


def test_share_of_an_array_task(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("LI_DIT_TASKS", raising=False)
    assert Share.from_environment() == Share(0, 1)
    array(monkeypatch, 5, 1, 64, 64)
    assert Share.from_environment() == Share(4, 64)
    array(monkeypatch, 17, 3, 17, 2)
    with pytest.raises(UserError, match="LI_DIT_TASKS"):
        Share.from_environment()
    array(monkeypatch, 17, 3, 17, 2, tasks=64)
    assert Share.from_environment() == Share(17, 64)
    array(monkeypatch, 64, 64, 64, 1, tasks=64)
    with pytest.raises(UserError, match="64"):
        Share.from_environment()


def test_share_from_text():
    assert Share.parse("3/8") == Share(3, 8)
    for wrong in ("8/8", "1", "-1/2", "a/b", "1/0", ""):
        with pytest.raises(UserError, match="task"):
            Share.parse(wrong)
