"""`python -m pipeline.ablate` whose runs only note that they were done, and by which array task."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from pipeline import ablate
from pipeline.ablation import report as ablation_report


def fake_score(task):
    """Return a score without any claim, whose seconds are the number of the task."""
    return {
        "score": 0.0,
        "attributes": {},
        "chance": {},
        "segments": [],
        "loss": None,
        "seconds": float(task),
    }


def run_job(job, processes, prompts):
    if job.score() is None:
        job.run.mkdir(parents=True)
        (job.run / "score.json").write_text(json.dumps(fake_score(int(os.environ["SLURM_ARRAY_TASK_ID"]))))


if __name__ == "__main__":
    with (
        patch.object(ablate, "run_job", run_job),
        patch.object(ablation_report, "build", lambda folder, *_: Path(folder)),
    ):
        ablate.main()
