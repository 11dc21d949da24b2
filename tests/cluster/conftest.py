import json
import sys
import tempfile
from pathlib import Path

import pytest
from slurm import MISSING, Slurm

ROOT = Path(__file__).parent.parent.parent
FAKE = """#!/bin/bash
if [ "$2" = pipeline.train ]; then shift 2; exec {python} {fake} "$@"; fi
exec {python} "$@"
"""
STAGE = """
name: fake
runs: {runs}
samples: 240
global_batch: 8
checkpoint: {{every_samples: 80}}
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"needs Slurm, missing: {', '.join(MISSING)} (Debian: slurm-wlm, munge)"))


@pytest.fixture(scope="session")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class Training:
    """A stage of 30 steps trained by the make-believe trainer: submit it, and look at what it left."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.stage, self.run = folder / "fake.yaml", folder / "runs" / "fake"
        self.stage.write_text(STAGE.format(runs=folder / "runs"))
        self.python = folder / "python"
        self.python.write_text(FAKE.format(python=sys.executable, fake=Path(__file__).parent / "fake_train.py"))
        self.python.chmod(0o755)

    def environment(self, **environment):
        ours = {"PYTHON": str(self.python), "PYTHONPATH": str(ROOT), "PREFLIGHT": "0"}
        return {**ours, **{key: str(value) for key, value in environment.items()}}

    def submit(self, *options, overrides=(), **environment):
        command = ["sbatch", "--parsable", f"--output={self.folder}/job-%j.txt", *options, "cluster/train.sh", str(self.stage), *overrides]
        return int(self.cluster.run(*command, cwd=ROOT, **self.environment(**environment)))

    def at_step(self, step, seconds=20):
        """Wait until the run has reported this step."""
        self.cluster.wait(lambda: any(row.get("step", 0) >= step for row in self.rows()), f"step {step}", seconds)

    def rows(self):
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []

    def steps(self):
        return [row["step"] for row in self.rows() if "event" not in row]

    def endings(self):
        path = self.run / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self, job):
        return (self.folder / f"job-{job}.txt").read_text()


@pytest.fixture
def training(slurm, tmp_path):
    one = Training(slurm, tmp_path)
    yield one
    for job in slurm.run("squeue", "-h", "-o", "%A").split():
        slurm.run("scancel", job, check=False)
    slurm.wait(lambda: not slurm.run("squeue", "-h"), "empty queue")
