"""The real trainer under the real Slurm: two nodes, ZeRO-3 over gloo."""

import json

import pytest

from pipeline.stage.config import dump_stage
from tests.helpers import fake_snapshot, trainer_tasks

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

BUCKETS = {"32x32": [20, 20, 9, 16], "32x64": [24, 11]}


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "event" not in row]


def test_stopped_and_resumed_training_has_the_losses_of_an_uninterrupted_one(slurm, training, tmp_path):
    fake_snapshot.make(tmp_path / "real", BUCKETS, tmp_path)
    stage = trainer_tasks.stage(str(tmp_path / "real"), tmp_path / "runs", samples=8 * 40)
    training.stage.write_text(dump_stage(stage))
    real = {"PYTHON": training.real_python, "DS_ACCELERATOR": "cpu"}
    straight = training.submit("--nodes=2", overrides=["name=straight"], **real)
    assert slurm.wait_for(straight, seconds=300)["JobState"] == "COMPLETED", training.output(straight)
    training.run = tmp_path / "runs" / "small"
    job = training.submit("--nodes=2", **real)
    training.at_step(1, seconds=240)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.start_now(job)
    assert slurm.wait_for(job, seconds=240)["JobState"] == "COMPLETED", training.output(job)
    assert [ending["kind"] for ending in training.endings()] == ["stop", "finished"], training.output(job)
    assert training.endings()[0]["step"] < 40
    assert losses(tmp_path / "runs/small") == losses(tmp_path / "runs/straight")
