"""Reading a run's `metrics.jsonl`, and its goodput. Imports no torch, which a login node may not have."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yield all complete lines of a run's metrics; a last line that a crash cut short is skipped."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return

    with path.open() as file:
        for line in file:
            # a killed rank may leave an incomplete line, and a running one may be writing it
            if line.endswith("\n"):
                yield json.loads(line)


def latest_reports(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports among a run's lines, by step.

    Steps that were run again after a return to a checkpoint count as they were last run.
    """
    # a later line of the same step replaces the earlier one
    reports = {line["step"]: line for line in lines if "event" not in line}
    return [reports[step] for step in sorted(reports)]


def read_reports(run: Path) -> list[dict[str, Any]]:
    """Return a run's reports by step, see `latest_reports`."""
    return latest_reports(read_lines(run))


def read_events(run: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Return a run's events in order: all of them, or those named `name`."""
    return [line for line in read_lines(run) if "event" in line and name in (None, line["event"])]


def goodput(seconds_in_steps: float, first_start: float, now: float) -> float:
    """Return the share of a run's time that went into steps that count.

    Restarts, saves, images and steps that were lost in a crash are in the whole time only.

    Args:
        seconds_in_steps: seconds spent in training steps whose result the run still has, each step once.
        first_start: time of the run's first start, in seconds since 1970.
        now: time up to which to count, in seconds since 1970.
    """
    return seconds_in_steps / max(now - first_start, 1e-9)


def seconds_in_steps(reports: Iterable[dict[str, Any]]) -> float:
    """Return the seconds spent in the steps that `latest_reports` cover."""
    seconds, samples = 0.0, 0
    for report in reports:
        # samples since the report before, divided by the speed in that interval
        if report.get("samples_per_second"):
            seconds += (report["samples"] - samples) / report["samples_per_second"]
        samples = report["samples"]
    return seconds
