"""The benchmark of the trainer's step runs, its captions are like real ones, and sorting saves FLOPs."""

import json

import numpy as np
import pytest

from benchmarks import trainer_step
from benchmarks.gpu_training import Work
from model.config import DiTConfig
from tests.helpers.distributed import on_ranks


def run_tiny():
    return trainer_step.measure(trainer_step.parse(["--tiny"]))


def test_a_tiny_run_has_fewer_flops_after_and_its_table(tmp_path, capsys):
    found = on_ranks(1, run_tiny)[0]
    before, after, ragged = (found["sides"][name] for name in ("before", "after", "after, ragged"))
    assert ragged["flops"] < after["flops"] < 0.9 * before["flops"]
    # The same batch with new weights.
    for side in (after, ragged):
        assert side["losses"] == pytest.approx(before["losses"], rel=0.2)

    out = tmp_path / "table.md"
    trainer_step.report(trainer_step.parse(["--tiny", "--out", str(out)]), found)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("after", "after, ragged"):
        assert last["goals"][f"samples/s, {name} / before"]["goal"] == trainer_step.GOAL
    assert last["flops_per_sample"]["after"] == after["flops"]
    assert "| after | " in out.read_text()


def test_captions_are_long_for_both_llms_or_short_for_both():
    work = Work(DiTConfig(), width=4096, side=32, samples=2_000, micro=64, longest=256)
    one, other = (np.array(counts) for counts in trainer_step.caption_tokens(work, 0).values())
    assert ((one == 0) == (other == 0)).all()
    assert 0.07 < (one == 0).mean() < 0.13
    read = one > 0
    assert np.corrcoef(one[read], other[read])[0, 1] > 0.95
    assert 110 < one[read].mean() < 140
    assert one.max() <= 256
