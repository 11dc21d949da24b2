"""Faults under the real Slurm with the real trainer: each costs no step, or ends in one line.

Each training takes about a minute, so all are slow: `pytest -m slow tests/cluster/test_real_faults.py`.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.stage.config import dump_stage
from tests.cluster.test_real_training import BUCKETS, losses
from tests.helpers import fake_snapshot, trainer_tasks

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(2400)]

SAMPLES = 8 * 160


class Real:
    """Trainings of one stage, each in a folder of its own name."""

    def __init__(self, training, folder):
        self.training, self.slurm, self.folder = training, training.cluster, folder
        fake_snapshot.make(folder / "real", BUCKETS, folder)
        stage = trainer_tasks.stage(
            str(folder / "real"),
            folder / "runs",
            samples=SAMPLES,
            data__workers=1,
            checkpoint__every_samples=8 * 20,
        )
        training.stage.write_text(dump_stage(stage))
        self.environment = {"PYTHON": training.real_python, "DS_ACCELERATOR": "cpu"}

    def submit(self, name, *overrides, **environment):
        self.training.run = self.folder / "runs" / name
        overrides = [f"name={name}", *overrides]
        return self.training.submit("--nodes=2", overrides=overrides, **{**self.environment, **environment})

    def ends(self, job, state="COMPLETED", seconds=900):
        assert self.slurm.wait_for(job, seconds=seconds)["JobState"] == state, self.training.output(job)
        return self.training.output(job)

    def rank(self, number):
        """The process of a rank."""
        mark = f"SLURM_PROCID={number}"
        (pid,) = (
            pid for pid in self.slurm.processes() if mark in self.slurm.environ(pid) and is_trainer(pid)
        )
        return pid


def is_trainer(pid):
    try:
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # srun has the same arguments behind it, and in a job's script also the same environment
    return b"python" in program and b"pipeline.train" in arguments


def parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def real(training, tmp_path):
    return Real(training, tmp_path)


def test_settings_that_change_between_two_starts_are_refused(real):
    job = real.submit("changed")
    real.training.at_step(5, seconds=400)
    real.slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    real.slurm.wait(real.training.endings, "ending", seconds=60)
    real.slurm.run("scancel", str(job))
    before = losses(real.training.run)
    refused = {
        "global_batch=4": "global_batch was 8 and is 4",
        "data.seed=7": "seed was 0 and is 7",
        "model.depth=3": "lacks blocks.2",
        "objective.name=ddpm": "objective",
    }
    for setting, message in refused.items():
        output = real.ends(real.submit("changed", setting), state="FAILED")
        assert message in output, output
        assert "Traceback" not in output, output
    assert losses(real.training.run) == before


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(real):
    runs = real.folder / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(runs)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        job = real.submit("full", f"data.cache={real.folder}/cache")
        output = real.ends(job, state="FAILED")
        assert "No space left" in output or "disk is full" in output, output
        assert str(runs) in output, output
        assert "Traceback" not in output, output
        subprocess.run(["mount", "-o", "remount,size=500m", str(runs)], check=True)
        real.ends(real.submit("full", f"data.cache={real.folder}/cache"))
        done = sorted(set(losses(runs / "full")))
        assert [step for step, _ in done] == list(range(1, SAMPLES // 8 + 1))
    finally:
        os.sync()
        subprocess.run(["umount", "-l", str(runs)], check=False)


def freeze_rank_0(real):
    """Rank 0 holds the store, so the other rank has nobody to ask."""
    real.slurm.freeze(real.rank(0))
    return r"rank 0 .* hangs: no heartbeat for 60 s"


def kill_a_loader_process(real):
    # The loader's processes are forks of the fork server, which is the rank's own child.
    rank = real.rank(0)
    loaders = [pid for pid in real.slurm.processes() if parent(parent(pid)) == rank]
    assert loaders
    for pid in loaders:
        real.slurm.kill(pid)
    return r"DataLoader worker \(pid\(s\) \d+.*\) exited unexpectedly"


STEPS = 60


@pytest.mark.parametrize("fault", [freeze_rank_0, kill_a_loader_process])
def test_a_fault_is_named_and_the_job_goes_on_with_the_same_losses(real, fault):
    real.ends(real.submit("straight", f"samples={8 * STEPS}"))
    straight = losses(real.folder / "runs/straight")

    job = real.submit("faulty", f"samples={8 * STEPS}")
    real.training.at_step(6, seconds=400)
    message = fault(real)
    # After the last step nobody waits for a rank any more, and nobody would name it.
    assert real.training.steps()[-1] < STEPS, "the fault came too late"
    real.slurm.wait(real.training.endings, "ending", seconds=240)
    real.slurm.start_now(job)
    output = real.ends(job)
    assert re.search(message, output), output
    # Steps after the last checkpoint were done twice, with the same losses.
    assert sorted(set(losses(real.folder / "runs/faulty"))) == straight
