"""Reading a run's `metrics.jsonl`, and its goodput. Imports no torch, which a login node may not have."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from model.common.records import parse_json

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20


def read_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yield all complete lines of a run's metrics.

    A last line that a crash cut short is skipped; damaged lines are skipped with a warning, since they must
    not keep a run from its next start.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return

    damage: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b""), start=1):
            try:
                parsed = _parse_line(line)
            except ValueError as error:
                # a killed rank may leave an incomplete line, and a running one may be writing it
                damage += [f"line {number}: {error}"] if line.endswith(b"\n") else []
                continue
            yield parsed
    if damage:
        log.warning("%s: %d damaged lines are passed over, the first is %s", path, len(damage), damage[0])


def _parse_line(data: bytes) -> dict[str, Any]:
    """Return a report, which has numbers only, or an event.

    Raises:
        ValueError: if the line is neither.
    """
    line = parse_json(data)
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    is_report = "event" not in line
    numbers = line if is_report else {name: line[name] for name in {"step", "samples"} & line.keys()}
    for name, value in numbers.items():
        if not isinstance(value, int | float | None):
            raise ValueError(f"{name[:100]!r} is not a number")

    # A report is found by its step and drawn over its samples, and every line counts for the run's time.
    for name, kind in {"time": float, **({"step": int, "samples": int} if is_report else {})}.items():
        if not isinstance(line.get(name), kind | int):
            raise ValueError(f"{name} is not a number")
    return line


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
