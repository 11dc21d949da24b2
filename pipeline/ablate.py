"""Train the rows of the paper's tables 2, 3, 5 and 6, or any others, with equal data, steps and seeds, and compare them.

    python -m pipeline.ablate scenes_ablation
    python -m pipeline.ablate my_stage families.a=llama3 families.a_plain=llama3_plain families.b=qwen families.b_plain=qwen_plain
    python -m pipeline.ablate scenes_ablation --only a,a_both --seeds 1 samples=6400
    python -m pipeline.ablate my_stage --rows my_rows.yaml
    python -m pipeline.ablate scenes_ablation --dry-run

Each row and seed is a run of its own in <runs>/<stage>_ablation/<row>/seed_<n>: what is trained, drawn or scored is not done
again, and what was stopped goes on where it was. A Slurm array task, or --task I/N, does its share; --dry-run prints the runs and
the `sbatch --array=...` line of those that are not done. Every call writes <runs>/<stage>_ablation/report.html and table.md anew
from what is there; --report does only that.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.dataset.parts import array_list
from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.scenes.captions import ScenePrompt, scene_prompts
from model.common.errors import UserError, command
from model.common.share import Share
from pipeline.ablation import report as ablation_report
from pipeline.ablation.rows import PAPER_ROWS, Job, make_jobs, read_ablation
from pipeline.evaluation.images import write_whole
from pipeline.following.positional_bias import scene_segment_scores
from pipeline.following.reading import read_scene
from pipeline.following.scoring import chance_level, prompt_following, score_objects
from pipeline.runtime.console import log_line
from pipeline.runtime.launch import start_ranks, wait_for
from pipeline.runtime.run_log import read_events
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import StageConfig, dump_stage, load_stage
from pipeline.stage.corpus import open_datasets


def train(job: Job, processes: int) -> None:
    """Train the unit's run to its end, from where it was.

    Raises:
        SystemExit: with the trainer's own exit code; it has said why.
    """
    job.run.parent.mkdir(parents=True, exist_ok=True)
    stage = job.run.with_suffix(".yaml")
    stage.write_text(dump_stage(job.stage))
    code = wait_for(start_ranks(processes, str(stage)), 0, EXIT_AGAIN)
    if code:
        sys.exit(code)


def draw(job: Job, prompts: list[str]) -> Path:
    """Draw a picture per prompt with the run's averaged weights; returns their folder.

    Raises:
        SystemExit: with the sampler's own exit code.
    """
    folder, file = job.run / "scenes", job.prompts
    if not (folder / "index.jsonl").exists():
        file.write_text("\n".join(prompts), encoding="utf-8")
        command = [sys.executable, "-m", "pipeline.sample", str(job.run), "--prompts", str(file), "--out", str(folder)]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)
    return folder


def scored_prompts(stage: StageConfig, count: int, longest: int) -> list[ScenePrompt]:
    """Held-out scenes as lists of one to `longest` segments, equally many of each length, at the stage's aspect ratio."""
    aspect = stage.sample.width / stage.sample.height
    return scene_prompts(count, "list", aspect, range(1, longest + 1))


def score(job: Job, prompts: list[ScenePrompt]) -> dict[str, Any]:
    """What the run reached: scores of its drawn scenes and their chance level, all in [0, 1], and its last validation loss."""
    folder = draw(job, [prompt.caption.text for prompt in prompts])
    records = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    seen = [read_scene(np.asarray(Image.open(folder / record["file"]).convert("RGB"))) for record in records]
    captions = [prompt.caption for prompt in prompts]
    scores = score_objects(seen, captions)
    validations = read_events(job.run, "validation")
    return {
        "score": prompt_following(scores.summary()),
        "attributes": scores.summary(),
        "chance": chance_level(seen, captions),
        "segments": scene_segment_scores(scores),
        "loss": validations[-1]["loss"] if validations else None,
    }


def run_job(job: Job, processes: int, prompts: list[ScenePrompt]) -> None:
    """Train, draw, score: whatever of it is not done yet."""
    if job.score() is not None:
        return
    begun = time.monotonic()
    log_line(f"{job.row}, seed {job.seed} ...")
    train(job, processes)
    record = score(job, prompts)
    record["seconds"] = round(time.monotonic() - begun, 1)
    write_whole(job.run / "score.json", json.dumps(record).encode())


def main_arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", help="name of a shipped stage, or path of a YAML; its data is that of all rows")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the stage, or families.ROLE=FAMILY over the rows")
    parser.add_argument("--rows", type=Path, default=PAPER_ROWS, help="YAML of families, rows and tables; default: the paper's")
    parser.add_argument("--only", default="", help="rows to keep, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row (default 3)")
    parser.add_argument("--scored", type=int, default=256, help="held-out scenes drawn and scored per run (default 256)")
    parser.add_argument(
        "--segments", type=int, default=8, help="longest scene prompt, in segments (default 8); all lengths alike"
    )
    parser.add_argument("--processes", type=int, default=0, help="ranks per run; default: one a GPU, or one on the CPU")
    parser.add_argument("--task", help="share I/N of the runs; in a Slurm array it is the task's own")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--report", action="store_true", help="only write the report of what is there")
    only.add_argument("--dry-run", action="store_true", help="only print the runs, and how to do them as a Slurm array")
    return parser


def show_runs(jobs: list[Job], left_out: list[str], words: list[str]) -> None:
    """Print the runs, which of them are done, and the line that does the others as a Slurm array.

    Args:
        units: all runs.
        left_out: rows that cannot be trained.
        words: the command line.
    """
    done = [job.score() is not None for job in jobs]
    for name in dict.fromkeys(job.row for job in jobs):
        seeds = [finished for job, finished in zip(jobs, done, strict=True) if job.row == name]
        print(f"{name:20} {sum(seeds)} of {len(seeds)} runs done")
    for reason in left_out:
        print(f"left out: {reason}")
    if not all(done):
        tasks = array_list(index for index, finished in enumerate(done) if not finished)
        again = shlex.join(word for word in words if word != "--dry-run")
        script = "cluster/run.sh pipeline.ablate"
        print(f"LI_DIT_TASKS={len(jobs)} sbatch --array={tasks} --gpus-per-node=1 {script} {again}")


@command
def main() -> None:
    """Entry of `python -m pipeline.ablate`."""
    arguments = main_arguments().parse_intermixed_args()
    roles = [word for word in arguments.settings if word.startswith("families.")]
    settings = [word for word in arguments.settings if word not in roles]
    ablation = read_ablation(arguments.rows, roles, [name for name in arguments.only.split(",") if name])
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: at least one run per row")
    base = load_stage(arguments.stage, settings)
    snapshot = read_snapshot(open_datasets(base)[0], base.data.snapshot)
    jobs, left_out = make_jobs(arguments.stage, settings, ablation, arguments.seeds, snapshot)
    if not jobs:
        raise UserError(f"no row can be trained: {'; '.join(left_out)}: name the dataset's families by families.ROLE=FAMILY")
    if arguments.dry_run:
        show_runs(jobs, left_out, sys.argv[1:])
        return
    share = Share.parse(arguments.task) if arguments.task else Share.from_environment()
    prompts = scored_prompts(base, arguments.scored, arguments.segments)
    texts = [prompt.caption.text for prompt in prompts]
    for job in jobs:
        job.check(texts)
    if not arguments.report:
        processes = arguments.processes or torch.cuda.device_count() or 1
        for job in jobs[share.index :: share.count]:
            run_job(job, processes, prompts)
    folder = Path(base.runs) / f"{base.name}_ablation"
    log_line(f"report: {ablation_report.build(folder, base, ablation, jobs, left_out)}")


if __name__ == "__main__":
    main()
