"""Show the state of a run: `python -m pipeline.status RUN`; without RUN, of every run under `runs/`.

RUN is a run's folder, or its name under `runs/`. Reads the run's folder and, where there is one, Slurm's
queue.
"""

import argparse
import json
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from model.common.errors import UserError, command
from model.common.settings import load_yaml
from pipeline.operations.attempts import Ending, read_endings
from pipeline.runtime.attempt import read_attempt
from pipeline.runtime.finished import FINISHED
from pipeline.runtime.run_log import elapsed_seconds, goodput, latest_reports, read_lines, seconds_in_steps

RECENT = 20
"""Number of reports that the current speed is averaged over."""
QUEUE_FORMAT = "%T|%r|%S|%N"


@dataclass
class Status:
    """The state of a run; None = not known (yet)."""

    name: str
    state: str
    step: int | None = None
    samples: int | None = None
    total: int | None = None
    """Samples of the whole stage."""
    loss: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    goodput: float | None = None
    """Share of the time since the first start that went into steps that count."""
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    """Seconds since the newest checkpoint was committed."""
    seconds_left: float | None = None
    """Seconds to the end of the stage, at the current speed and goodput."""
    starts: int = 0


def queue_line(job: str) -> str:
    """Describe a job in Slurm's queue: its state and nodes or, while it waits, the reason.

    Returns:
        An empty string if the job is not in the queue, or there is no Slurm.
    """
    if not job or shutil.which("squeue") is None:
        return ""
    arguments = ["squeue", "-h", "-j", job, "-o", QUEUE_FORMAT]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    # squeue fails for jobs that are no longer in the queue
    if result.returncode or not result.stdout.strip():
        return ""
    state, reason, start, nodes = result.stdout.strip().splitlines()[0].split("|")
    where = f"on {nodes}" if nodes else f"{reason}, starts {start}"
    return f"job {job} {state.lower()} {where}"


def read_status(run: Path, now: float) -> Status:
    """Read the state of a run from its files.

    Raises:
        UserError: if the run does not exist.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run; `python -m pipeline.status` lists all runs")
    lines = list(read_lines(run))
    # steps that were lost in a crash and trained again must not count twice
    reports = latest_reports(lines)

    attempt, endings = read_attempt(run), read_endings(run)
    status = Status(run.name, _state(run, endings, queue_line(attempt.job if attempt else "")))
    status.starts = sum(line.get("event") == "start" for line in lines)
    # only this key is read, so that runs of other versions can be shown too
    stage_file = run / "stage.yaml"
    if stage_file.exists():
        status.total = int(OmegaConf.select(load_yaml(stage_file), "samples"))

    if reports:
        last = reports[-1]
        status.step, status.samples = last["step"], last["samples"]
        status.loss, status.mfu = last.get("loss"), last.get("mfu")
        status.samples_per_second = _speed(reports[-RECENT:])
        # up to the last line: a run that waits in the queue does not lose goodput
        if elapsed := elapsed_seconds(lines):
            status.goodput = goodput(seconds_in_steps(reports), elapsed)

    checkpoints = sorted((run / "checkpoints").glob("step_*/manifest.json"))
    if checkpoints:
        status.checkpoint = checkpoints[-1].parent.name
        # the manifest is the last file of a checkpoint, so its time is that of the commit; by a file server's
        # clock, which may be ahead
        status.checkpoint_age = max(0.0, now - checkpoints[-1].stat().st_mtime)

    if status.state == "finished":
        status.seconds_left = 0.0
    elif status.total and status.samples is not None and status.samples_per_second and status.goodput:
        left = max(0, status.total - status.samples)
        # goodput includes restarts and saves, so the estimate does too
        status.seconds_left = left / status.samples_per_second / status.goodput
    return status


def _speed(reports: list[dict[str, Any]]) -> float | None:
    """Return the mean samples per second of some reports, each weighted by its samples."""
    speeds = [report["samples_per_second"] for report in reports if report.get("samples_per_second")]
    # the harmonic mean, since reports cover equal numbers of samples and not equal times
    return len(speeds) / sum(1 / speed for speed in speeds) if speeds else None


def _state(run: Path, endings: list[Ending], queued: str) -> str:
    # before the queue: a job stays there for some time after its stage is finished
    if (run / FINISHED).exists():
        return "finished"
    # the queue is more recent than the last ending
    if queued:
        return queued
    if endings and not endings[-1].requeued:
        return f"ended ({endings[-1].kind}): submit it again to continue"
    return "not in the queue"


def duration(seconds: float) -> str:
    """Return a duration as text: `3 d 4 h`, `5 h 20 min`, `12 min`, `8 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if number]
    return " ".join(parts[:2])


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def show(status: Status, endings: list[Ending], now: float, console: Console) -> None:
    """Print one run, with one fact per line, and then its attempts with their endings."""
    speed = f"{_format(status.samples_per_second, '{:,.1f}')} samples/s, MFU {_format(status.mfu, '{:.1%}')}"
    checkpoint, end = "-", "-"
    if status.checkpoint is not None:
        checkpoint = f"{status.checkpoint}, {duration(status.checkpoint_age or 0)} ago"
    if status.seconds_left:
        date = time.strftime("%a %d %b %H:%M", time.localtime(now + status.seconds_left))
        end = f"{date}, in {duration(status.seconds_left)}"

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("state", status.state)
    table.add_row("step", _format(status.step, "{:,}"))
    table.add_row("samples", f"{_format(status.samples, '{:,}')} of {_format(status.total, '{:,}')}")
    table.add_row("loss", _format(status.loss, "{:.4f}"))
    table.add_row("speed", speed)
    table.add_row("goodput", _format(status.goodput, "{:.1%}"))
    table.add_row("checkpoint", checkpoint)
    table.add_row("end", end)
    table.add_row("starts", str(status.starts))
    console.print(table)

    for ending in endings:
        started = time.strftime("%d %b %H:%M", time.localtime(ending.started))
        console.print(
            f"  {started}  job {ending.job}.{ending.restart} on {ending.nodes}: {ending.kind} at step "
            f"{ending.step:,} after {duration(ending.ended - ending.started)}: "
            f"{ending.reason}{'; requeued' if ending.requeued else ''}"
        )


def show_all(statuses: list[Status], console: Console) -> None:
    """Print all runs, one per line."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "step", "done", "loss", "samples/s", "starts", "left", "state"):
        table.add_column(column)
    for status in statuses:
        done = status.samples / status.total if status.samples is not None and status.total else None
        table.add_row(
            status.name,
            _format(status.step, "{:,}"),
            _format(done, "{:.1%}"),
            _format(status.loss, "{:.4f}"),
            _format(status.samples_per_second, "{:,.1f}"),
            str(status.starts),
            duration(status.seconds_left) if status.seconds_left else "-",
            status.state,
        )
    console.print(table)


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument(
        "run", nargs="?", help="folder of a run, or its name under runs/; default: all runs there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line per run")
    arguments = parser.parse_args()

    now = time.time()
    if arguments.run is None:
        # `runs/` also has folders that are no runs, such as those of ablations
        runs = sorted(path.parent for path in Path("runs").glob("*/metrics.jsonl"))
    else:
        runs = [Path(arguments.run) if Path(arguments.run).is_dir() else Path("runs") / arguments.run]
    statuses = [read_status(run, now) for run in runs]

    console = Console(soft_wrap=True, highlight=False)
    if arguments.json:
        for status in statuses:
            print(json.dumps(asdict(status)))
    elif arguments.run is None:
        show_all(statuses, console)
    else:
        show(statuses[0], read_endings(runs[0]), now, console)


if __name__ == "__main__":
    main()
