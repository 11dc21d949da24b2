"""How a run stands: `python -m pipeline.status RUN`, or without RUN every run under `runs/`, a line each.

RUN is a run's folder, or its name under `runs/`. Reads the run's folder and, where there is one, Slurm's queue.
"""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from model.common.errors import UserError, command
from pipeline.operations.attempts import Ending, read_endings
from pipeline.runtime.attempt import read_attempt

RECENT = 20
"""Reports over which the present speed is taken."""
QUEUE_FORMAT = "%T|%r|%S|%N"


@dataclass
class Status:
    """What is known of a run; None = not known (yet)."""

    name: str
    state: str
    step: int | None = None
    samples: int | None = None
    total: int | None = None
    loss: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    goodput: float | None = None
    """Share of the time since the first start that went into steps that count."""
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    """Seconds since the newest checkpoint was committed."""
    seconds_left: float | None = None
    """To the end of the stage, at the present speed and goodput."""
    starts: int = 0


def read_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a run's metrics, without torch, which a login node may not have (see `pipeline.training.metrics`)."""
    path = run / "metrics.jsonl"
    if path.exists():
        with path.open() as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def queue_line(job: str) -> str:
    """The job in Slurm's queue: state, and for one that waits why and until when; empty when it is not there, or no Slurm is."""
    if not job or shutil.which("squeue") is None:
        return ""
    asked = ["squeue", "-h", "-j", job, "-o", QUEUE_FORMAT]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or not done.stdout.strip():
        return ""
    state, reason, start, nodes = done.stdout.strip().splitlines()[0].split("|")
    where = f"on {nodes}" if nodes else f"{reason}, starts {start}"
    return f"job {job} {state.lower()} {where}"


def read_status(run: Path, now: float) -> Status:
    """Put a run's files together.

    Raises:
        UserError: there is no such run.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run; see `python -m pipeline.status` for those there are")
    rows = list(read_rows(run))
    reports = {row["step"]: row for row in rows if "event" not in row}
    reports = [reports[step] for step in sorted(reports)]
    attempt, endings = read_attempt(run), read_endings(run)
    status = Status(run.name, _state(run, endings, queue_line(attempt.job if attempt else "")))
    status.starts = sum(row.get("event") in ("start", "resume") for row in rows)
    resolved = run / "stage.yaml"
    if resolved.exists():
        status.total = int(OmegaConf.select(OmegaConf.load(resolved), "samples"))
    if reports:
        last = reports[-1]
        status.step, status.samples, status.loss, status.mfu = last["step"], last["samples"], last.get("loss"), last.get("mfu")
        speeds = [row["samples_per_second"] for row in reports[-RECENT:] if row.get("samples_per_second")]
        status.samples_per_second = len(speeds) / sum(1 / speed for speed in speeds) if speeds else None
        status.goodput = _goodput(rows, reports)
    checkpoints = sorted(path for path in (run / "checkpoints").glob("step_*") if (path / "manifest.json").exists())
    if checkpoints:
        status.checkpoint = checkpoints[-1].name
        status.checkpoint_age = now - (checkpoints[-1] / "manifest.json").stat().st_mtime
    if status.state == "finished":
        status.seconds_left = 0.0
    elif status.total and status.samples is not None and status.samples_per_second and status.goodput:
        left = max(0, status.total - status.samples)
        status.seconds_left = left / status.samples_per_second / min(1.0, status.goodput)
    return status


def _state(run: Path, endings: list[Ending], queued: str) -> str:
    if (run / "finished.json").exists():
        return "finished"
    if queued:
        return queued
    if endings and not endings[-1].requeued:
        return f"ended ({endings[-1].kind}): submit again to go on"
    return "not in the queue"


def _goodput(rows: list[dict[str, Any]], reports: list[dict[str, Any]]) -> float | None:
    """Seconds of the steps that count (each once, as last run) over the seconds from the first line to the last."""
    done, useful = 0, 0.0
    for report in reports:
        if report.get("samples_per_second"):
            useful += (report["samples"] - done) / report["samples_per_second"]
        done = report["samples"]
    wall = rows[-1]["time"] - rows[0]["time"]
    return useful / wall if wall > 0 else None


def duration(seconds: float) -> str:
    """`3 d 4 h`, `5 h 20 min`, `12 min`, `8 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if number]
    return " ".join(parts[:2])


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def show(status: Status, endings: list[Ending], now: float, console: Console) -> None:
    """One run, a line a fact, then its starts and why they ended."""
    table = Table(box=None, show_header=False, pad_edge=False)
    end = None if not status.seconds_left else now + status.seconds_left
    lines = {
        "state": status.state,
        "step": _form(status.step, "{:,}"),
        "samples": f"{_form(status.samples, '{:,}')} of {_form(status.total, '{:,}')}",
        "loss": _form(status.loss, "{:.4f}"),
        "speed": f"{_form(status.samples_per_second, '{:,.1f}')} samples/s, MFU {_form(status.mfu, '{:.1%}')}",
        "goodput": _form(status.goodput, "{:.1%}"),
        "checkpoint": "-" if status.checkpoint is None else f"{status.checkpoint}, {duration(status.checkpoint_age or 0)} ago",
        "end": "-" if end is None else f"{time.strftime('%a %d %b %H:%M', time.localtime(end))}, in {duration(end - now)}",
        "starts": str(status.starts),
    }
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table)
    for ending in endings:
        began = time.strftime("%d %b %H:%M", time.localtime(ending.started))
        console.print(
            f"  {began}  job {ending.job}.{ending.restart} on {ending.nodes}: {ending.kind} at step {ending.step:,} after "
            f"{duration(ending.ended - ending.started)}: {ending.reason}{'; requeued' if ending.requeued else ''}"
        )


def show_all(statuses: list[Status], console: Console) -> None:
    """All runs, a line each."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "step", "done", "loss", "samples/s", "starts", "left", "state"):
        table.add_column(column)
    for one in statuses:
        done = one.samples / one.total if one.samples is not None and one.total else None
        left = "-" if not one.seconds_left else duration(one.seconds_left)
        facts = (
            _form(one.step, "{:,}"),
            _form(done, "{:.1%}"),
            _form(one.loss, "{:.4f}"),
            _form(one.samples_per_second, "{:,.1f}"),
        )
        table.add_row(one.name, *facts, str(one.starts), left, one.state)
    console.print(table)


@command
def main() -> None:
    """Entry of `python -m pipeline.status`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description=__doc__)
    parser.add_argument("run", nargs="?", help="folder of a run, or its name under runs/; none = all runs there")
    parser.add_argument("--json", action="store_true", help="as JSON, a line a run")
    arguments = parser.parse_args()
    now = time.time()
    if arguments.run is None:
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
