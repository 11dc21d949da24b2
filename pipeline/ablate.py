"""Train and compare rows of the paper's tables 2, 3, 5 and 6 (or others) with equal data, steps and seeds.

    python -m pipeline.ablate scenes_ablation
    python -m pipeline.ablate my_stage families.a=llama3 families.a_plain=llama3_plain families.b=qwen ...
    python -m pipeline.ablate scenes_ablation --only a,a_both --seeds 1 samples=6400
    python -m pipeline.ablate my_stage --rows my_rows.yaml
    python -m pipeline.ablate scenes_ablation --dry-run

Each row and seed is a run in <runs>/<stage>_ablation/<row>/seed_<n>. What is trained, generated or scored is
not repeated, and what was stopped is continued. A Slurm array task, or --task I/N, does its share; --dry-run
prints the runs and the `sbatch --array=...` line of those that are not done. Every call writes
report.html, table.md and positions.svg of <runs>/<stage>_ablation from all results so far; --report does only
that.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep.dataset.parts import array_list
from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.scenes.captions import SceneCaption, ScenePrompt, scene_prompts
from model.common.errors import UserError, command
from model.common.files import write_atomic
from model.common.records import seal
from model.common.share import Share
from pipeline.ablation import report as ablation_report
from pipeline.ablation.rows import PAPER_ROWS, Job, Score, make_jobs, read_ablation
from pipeline.following.contrast import CONTRASTS, Contrast, contrast_captions, contrast_scores
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
    """Train a job's run to its end, from where it was stopped.

    Raises:
        SystemExit: with the trainer's exit code; the trainer has printed the reason.
    """
    job.run.parent.mkdir(parents=True, exist_ok=True)
    stage_file = job.run.with_suffix(".yaml")
    # the ranks read the resolved stage, with the row's settings and the snapshot
    stage_file.write_text(dump_stage(job.stage))
    code = wait_for(start_ranks(processes, str(stage_file)), 0, EXIT_AGAIN)
    # 85 ends this command too: the job is to be started again
    if code:
        sys.exit(code)


def generate(job: Job, prompts: list[str]) -> Path:
    """Generate one image per prompt with the run's averaged weights, and return their folder.

    Each has its own noise: by one noise for all prompts the same run scored 19.6, 25.7 or 34.0.

    Raises:
        SystemExit: with the sampler's exit code; the sampler has printed the reason.
    """
    folder = job.run / "scenes"
    if not (folder / "index.jsonl").exists():
        # kept with the run, so that a later call can check that its prompts are the same
        job.prompts.write_text("\n".join(prompts), encoding="utf-8")
        arguments = [str(job.run), "--prompts", str(job.prompts), "--out", str(folder), "--own-seeds"]
        arguments += ["--together", "--batch", "32"]
        # a process of its own returns all GPU memory before the next run is trained
        code = subprocess.run([sys.executable, "-m", "pipeline.sample", *arguments]).returncode
        if code:
            sys.exit(code)
    return folder


def held_out_prompts(stage: StageConfig, count: int, max_segments: int) -> list[ScenePrompt]:
    """Return held-out scenes of the stage's aspect ratio as lists of one to `max_segments` segments.

    Each length has the same number of scenes.
    """
    # scenes of the shape that the run samples, so that positions in the prompts keep their meaning
    aspect = stage.sample.width / stage.sample.height
    lengths = range(1, max_segments + 1)
    return scene_prompts(count, "list", aspect, lengths, style=stage.sample.scenes_style)


@dataclass(frozen=True)
class Judge:
    """Held-out prompts of an ablation: lists, and those of each kind of contrast."""

    lists: list[SceneCaption]
    contrast: dict[Contrast, list[SceneCaption]]

    @classmethod
    def of(cls, stage: StageConfig, count: int, max_segments: int, contrast: int) -> "Judge":
        """Return the prompts for a stage.

        Args:
            stage: all rows sample as it does.
            count: number of lists.
            max_segments: of a list.
            contrast: number of prompts of each kind of contrast.
        """
        lists = [prompt.caption for prompt in held_out_prompts(stage, count, max_segments)]
        aspect, style = stage.sample.width / stage.sample.height, stage.sample.scenes_style
        kinds = CONTRASTS if contrast else ()
        return cls(lists, {kind: contrast_captions(kind, contrast, aspect, style) for kind in kinds})

    @property
    def captions(self) -> list[SceneCaption]:
        """All captions, in the order of the images."""
        return [*self.lists, *chain.from_iterable(self.contrast.values())]

    @property
    def texts(self) -> list[str]:
        """Texts of all captions."""
        return [caption.text for caption in self.captions]


def score(job: Job, judge: Judge) -> Score:
    """Generate and score the scenes of a run.

    Returns:
        Scores and their chance level, all in [0, 1], and the last validation loss.
    """
    folder = generate(job, judge.texts)
    records = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    scale = job.stage.sample.scenes_scale
    objects = [
        read_scene(np.asarray(Image.open(folder / record["file"]).convert("RGB")), scale)
        for record in records
    ]

    detected = iter(objects)
    listed = list(islice(detected, len(judge.lists)))
    scores = score_objects(listed, judge.lists)
    contrast: dict[str, list[float]] = {}
    for kind, captions in judge.contrast.items():
        contrast[kind] = contrast_scores(kind, list(islice(detected, len(captions))), captions)

    validations = read_events(job.run, "validation")
    return {
        "score": prompt_following(scores.summary()),
        "attributes": scores.summary(),
        "chance": chance_level(listed, judge.lists),
        "segments": scene_segment_scores(scores),
        "contrast": contrast,
        "loss": validations[-1]["loss"] if validations else None,
    }


def run_job(job: Job, processes: int, judge: Judge) -> None:
    """Train, generate and score, as far as it is not done yet."""
    # `score.json` is written last, so a run that has it is done
    if job.score() is not None:
        return
    # the time includes only this start, not those that were stopped before
    started = time.monotonic()
    log_line(f"{job.row}, seed {job.seed} ...")
    train(job, processes)
    record = score(job, judge)
    record["seconds"] = round(time.monotonic() - started, 1)
    # atomic, since another task may read it for its report at any time
    write_atomic(job.run / "score.json", seal(dict(record)))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stage", help="name of a shipped stage, or path of a YAML; all rows use its data")
    add(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings that override the stage's, or families.ROLE=FAMILY for the rows",
    )
    add(
        "--rows",
        type=Path,
        default=PAPER_ROWS,
        help="YAML of families, rows and tables; default: the paper's",
    )
    add("--only", default="", help="rows to keep, separated by commas")
    add("--seeds", type=int, default=3, help="runs per row (default 3)")
    add("--scored", type=int, default=256, help="held-out scenes generated and scored per run (default 256)")
    add("--segments", type=int, default=8, help="maximum number of segments of a scene prompt (default 8)")
    add(
        "--contrast",
        type=int,
        default=0,
        help="prompts of each kind of the contrast set: exchanged pairs, negations, distant colors, "
        "relations (default 0; even)",
    )
    add("--processes", type=int, default=0, help="ranks per run; default: one per GPU, or one on the CPU")
    add("--task", help="share I/N of the runs; default: the share of this Slurm array task")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--report", action="store_true", help="only write the report of the results so far")
    only.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the runs, and the command that runs them as a Slurm array",
    )
    return parser


def show_runs(jobs: list[Job], left_out: list[str], words: list[str]) -> None:
    """Print the runs, which of them are done, and the command that runs the others as a Slurm array.

    Args:
        jobs: all runs.
        left_out: rows that cannot be trained.
        words: the command line.
    """
    done = [job.score() is not None for job in jobs]
    for name in dict.fromkeys(job.row for job in jobs):
        row_done = [finished for job, finished in zip(jobs, done, strict=True) if job.row == name]
        print(f"{name:20} {sum(row_done)} of {len(row_done)} runs done")
    for reason in left_out:
        print(f"left out: {reason}")

    if not all(done):
        # indices among all jobs: the task numbers stay the same when some jobs are done
        tasks = array_list(index for index, finished in enumerate(done) if not finished)
        again = shlex.join(word for word in words if word != "--dry-run")
        script = "cluster/run.sh pipeline.ablate"
        print(f"LI_DIT_TASKS={len(jobs)} sbatch --array={tasks} --gpus-per-node=1 {script} {again}")


@command
def main() -> None:
    """Run the command line."""
    arguments = make_parser().parse_intermixed_args()
    roles = [word for word in arguments.settings if word.startswith("families.")]
    settings = [word for word in arguments.settings if word not in roles]
    rows = [name for name in arguments.only.split(",") if name]
    ablation = read_ablation(arguments.rows, roles, rows)
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: at least one run per row")

    # all rows read one snapshot, so that a new one cannot change the data between two runs
    base = load_stage(arguments.stage, settings)
    snapshot = read_snapshot(open_datasets(base)[0], base.data.snapshot)
    jobs, left_out = make_jobs(arguments.stage, settings, ablation, arguments.seeds, snapshot)
    if not jobs:
        reasons = "; ".join(left_out)
        raise UserError(
            f"no row can be trained: {reasons}: name the dataset's families by families.ROLE=FAMILY"
        )
    if arguments.dry_run:
        show_runs(jobs, left_out, sys.argv[1:])
        return

    share = Share.parse(arguments.task) if arguments.task else Share.from_environment()
    if arguments.contrast % 2:
        raise UserError(f"--contrast {arguments.contrast}: exchanged prompts are pairs: give an even number")
    judge = Judge.of(base, arguments.scored, arguments.segments, arguments.contrast)
    # before any run is trained: a difference would be found hours later otherwise
    for job in jobs:
        job.check(judge.texts)

    if not arguments.report:
        processes = arguments.processes or torch.cuda.device_count() or 1
        # from all jobs, also those that are done, so that each task's jobs never change
        for job in jobs[share.index :: share.count]:
            run_job(job, processes, judge)
    # every task writes the report, so the one that ends last writes the complete report
    folder = Path(base.runs) / f"{base.name}_ablation"
    log_line(f"report: {ablation_report.build(folder, base, ablation, jobs, left_out)}")


if __name__ == "__main__":
    main()
