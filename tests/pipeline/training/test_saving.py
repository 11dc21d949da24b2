"""Periodic saves of a run: when they wait, and a look at the disk before the first step."""

import math
import re
import shutil

import pytest

from pipeline.runtime.run_log import read_events
from pipeline.runtime.stopping import EXIT_AGAIN
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import on_ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fake_snapshot.make(folder / "store", {"32x32": [20, 20, 9, 16], "32x64": [24, 11]}, folder)
    return str(folder / "store")


@pytest.mark.slow
def test_periodic_saves_wait_for_a_step_that_is_applied(store, tmp_path):
    """Checkpoints of skipped steps would push out those from before the fault."""
    settings = {"optim__max_skipped_steps": 5, "checkpoint__every_samples": 16}
    for folder, stop_at, code, saves in (
        ("whole", None, 0, [2, 7, 8, 10, 12]),  # steps 4, 5 and 6 are skipped
        ("stopped", 5, EXIT_AGAIN, [2, 5]),
    ):
        arguments = (store, str(tmp_path / folder), math.nan, [3, 4, 5], settings, stop_at)
        assert on_ranks(2, trainer_tasks.train_spoiled, *arguments) == [code, code]
        run = tmp_path / folder / "small"
        assert [event["step"] for event in read_events(run, "skipped")][:2] == [4, 5]
        assert [event["step"] for event in read_events(run, "save")] == saves


def test_too_little_room_for_the_checkpoints_is_one_line_before_the_first_step(store, tmp_path):
    settings = {"checkpoint__every_samples": 8, "checkpoint__keep_last": 3, "engine__zero_stage": 3}
    task = trainer_tasks.train_on_a_small_disk
    (looked, lines), other = on_ranks(2, task, store, str(tmp_path), 100_000, 4, settings)
    checkpoints = tmp_path / "small/checkpoints"
    assert other == ([], [])
    assert looked == [checkpoints.parent]
    needed = re.fullmatch(
        rf"{checkpoints}: 0\.0001 GB are free, and 4 more checkpoints need (\S+) GB: make room there, or "
        r"keep fewer \(checkpoint\.keep_last, checkpoint\.keep_every_samples\)",
        *lines,
    )
    sizes = [sum(file.stat().st_size for file in step.iterdir()) for step in checkpoints.glob("step_*")]
    assert len(sizes) == 3
    assert float(needed[1]) * 1e9 == pytest.approx(4 * sizes[0], rel=0.1)

    # Three are there, each of which the next one replaces; of those to come, two are kept forever.
    kept = {**settings, "checkpoint__keep_every_samples": 40}
    for free, count in ((1.1 * sizes[0], 3), (3.1 * sizes[0], 0)):
        shutil.copytree(tmp_path / "small", tmp_path / f"{count}/small")
        (_, lines), _ = on_ranks(2, task, store, str(tmp_path / str(count)), free, 0, kept)
        assert [re.search(r"(\d+) more", line)[1] for line in lines] == [str(count)] * bool(count)
