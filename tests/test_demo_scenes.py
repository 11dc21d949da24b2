"""`make demo-scenes` from start to end in seconds: every phase, the plan, a stop, a report with the score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.demonstration.plan import MIN_IMAGES
from pipeline.runtime.run_log import read_events, read_reports

SMALLER = ["model.width=64", "model.depth=1", "model.heads=2", "fusion.width=32", "log.every_steps=1"]
"""Settings that save minutes and change no phase."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_on_scenes_in_seconds(tmp_path):
    command = [sys.executable, "-m", "pipeline.demo", "scenes", "minutes=0.5", *SMALLER]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)

    run = tmp_path / "runs" / "demo_scenes"
    plan = json.loads((run / "plan.json").read_text())
    assert read_reports(run)[-1]["samples"] == plan["samples"]
    # on a slow machine the plan is two steps, which are over before the ranks hear of the stop
    assert len(read_events(run, "start")) in (1, 2)
    measured = json.loads((run / "measured.json").read_text())
    assert {"colour", "shape"} <= set(measured["images"]["right"])
    assert len((run / "follow" / "pictures" / "index.jsonl").read_text().splitlines()) == plan["images"]
    assert plan["images"] >= MIN_IMAGES

    page = (run / "report.html").read_text()
    assert f"right in {plan['images']} new prompts (chance " in page
    assert page.count("<figure>") == min(24, plan["images"])

    # a second start finds every phase done, and writes the same report
    again = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert again.stdout.count("done before") == len(json.loads((run / "phases.json").read_text())) - 1
    assert Path(run / "report.html").exists()
