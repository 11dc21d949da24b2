import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_prep.dataset.schema import Family, Snapshot
from data_prep.dataset.snapshot_reader import HISTORY
from data_prep.store.store import open_store
from model.common.records import canonical_json
from tests.helpers.slurm import MISSING, Slurm

ROOT = Path(__file__).parent.parent.parent
PYTHON = """#!/bin/bash
case $2 in
  pipeline.train) shift 2; exec {python} {here}/fake_train.py "$@" ;;
  data_prep | pipeline.sample) shift; exec {python} {here}/fake_data.py "$@" ;;
  pipeline.ablate) shift 2; exec {python} {here}/fake_ablate.py "$@" ;;
  pipeline.operations.node_check) eval "${{FAKE_NODE:-}}" ;;
esac
exec {python} "$@"
"""
STAGE = """
runs: {runs}
samples: 240
global_batch: 8
data: {{store: {store}, dataset: set}}
fusion: {{families: [llm]}}
checkpoint: {{every_samples: 80}}
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slurm") and MISSING:
            item.add_marker(
                pytest.mark.skip(
                    reason=f"needs Slurm, missing: {', '.join(MISSING)} (Debian: slurm-wlm, munge)"
                )
            )


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
        self.stage, self.run = self.add_stage("fake"), folder / "runs" / "fake"
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(python=sys.executable, here=ROOT / "tests" / "helpers"))
        self.python.chmod(0o755)
        self.settings = folder / "env.sh"
        self.settings.write_text(
            ". cluster/env.sh\nSHARD_OPTIONS=(--array=0-2)\nENCODE_OPTIONS=(--array=0-2)\n"
        )
        self.real_python = sys.executable
        self.logs = folder / "logs"
        self.logs.mkdir()
        families = {
            "latents": Family("latents", "latents", {"vae": "none"}, {"channels": 16}),
            "llm": Family("llm", "text", {"llm": "none"}, {"width": 64}),
        }
        snapshot = Snapshot("set", ["original"], families, {}, {})
        dataset = open_store(str(folder / "store"), create=True).sub("set")
        dataset.put(f"snapshots/{snapshot.id}/snapshot.json", snapshot.to_json())
        dataset.put(
            f"{HISTORY}000001.json", canonical_json({"id": snapshot.id, "taken": "2026-01-01T00:00:00Z"})
        )

    def add_stage(self, name):
        path = self.folder / f"{name}.yaml"
        path.write_text(STAGE.format(runs=self.folder / "runs", store=self.folder / "store"))
        return path

    def environment(self, **environment):
        ours = {
            "PYTHON": str(self.python),
            "PYTHONPATH": str(ROOT),
            "PREFLIGHT": "0",
            "FAKE_RECORD": str(self.folder),
            "LI_DIT_ENV": str(self.settings),
            "SBATCH_OUTPUT": f"{self.logs}/job-%j.txt",
        }
        return {**ours, **{key: str(value) for key, value in environment.items()}}

    def submit(self, *options, overrides=(), **environment):
        script = ("cluster/train.sh", str(self.stage), *overrides)
        return int(self.type("sbatch", "--parsable", *options, *script, **environment))

    def type(self, *command, **environment):
        """Type a command in the project's folder; returns what it printed."""
        return self.cluster.run(*command, cwd=ROOT, **self.environment(**environment))

    def attempt(self, *command, **environment):
        """Type a command that may fail; returns its code and what it printed."""
        environment = {**self.cluster.environment, **self.environment(**environment)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    def at_step(self, step, seconds=20):
        """Wait until the run has reported this step."""
        self.cluster.wait(
            lambda: any(row.get("step", 0) >= step for row in self.rows()), f"step {step}", seconds
        )

    def rows(self):
        path = self.run / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
            if path.exists()
            else []
        )

    def steps(self):
        return [row["step"] for row in self.rows() if "event" not in row]

    def endings(self):
        path = self.run / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self, job):
        return (self.logs / f"job-{job}.txt").read_text()


@pytest.fixture
def training(slurm, tmp_path):
    one = Training(slurm, tmp_path)
    yield one
    slurm.empty()


@pytest.fixture(scope="module")
def out_of_time(slurm, tmp_path_factory):
    """A training and its job, with one minute to live, of which Slurm tells it at 50 s.

    Slurm looks at limits twice a minute and may tell a minute early; so the job runs aside while other tests
    run.
    """
    training = Training(slurm, tmp_path_factory.mktemp("out_of_time"))
    return training, training.submit("--partition=aside", "--time=1", "--signal=B:USR1@50", FAKE_STEP=1)
