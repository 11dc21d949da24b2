"""Reading a run's `metrics.jsonl`, and its goodput. Imports no torch, which a login node may not have."""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
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


def elapsed_seconds(lines: Iterable[dict[str, Any]], until: float | None = None) -> float:
    """Return the time that a run's lines span, with all waits between its starts.

    A clock that was set back between two lines takes nothing away again.

    Args:
        lines: a run's lines in order.
        until: time to count up to, in seconds since 1970; None = the last line.
    """
    times = [line["time"] for line in lines]
    # Nothing was written before the first line, so it counts from there.
    if times and until is not None:
        times.append(until)
    return sum(max(0.0, later - time) for time, later in pairwise(times))


def goodput(seconds_in_steps: float, elapsed: float) -> float:
    """Return the share of a run's time that went into steps that count.

    Restarts, saves, images and steps that were lost in a crash are in the whole time only.

    Args:
        seconds_in_steps: seconds spent in training steps whose result the run still has, each step once.
        elapsed: see `elapsed_seconds`; clocks that were set back may have made it too short.
    """
    return seconds_in_steps / max(elapsed, seconds_in_steps, 1e-9)


def seconds_in_steps(reports: Iterable[dict[str, Any]]) -> float:
    """Return the seconds spent in the steps that `latest_reports` cover."""
    seconds, samples = 0.0, 0
    for report in reports:
        # samples since the report before, divided by the speed in that interval
        if report.get("samples_per_second"):
            seconds += (report["samples"] - samples) / report["samples_per_second"]
        samples = report["samples"]
    return seconds
