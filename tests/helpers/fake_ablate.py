"""`python -m pipeline.ablate` whose runs only note that they were done, and by which array task."""

import json
import os
from pathlib import Path
from unittest.mock import patch

from pipeline import ablate
from pipeline.ablation import report as ablation_report


def run_job(job, processes, prompts):
    if job.score() is None:
        job.run.mkdir(parents=True)
        (job.run / "score.json").write_text(json.dumps({"task": int(os.environ["SLURM_ARRAY_TASK_ID"])}))


with (
    patch.object(ablate, "run_job", run_job),
    patch.object(ablation_report, "build", lambda folder, *_: Path(folder)),
):
    ablate.main()
