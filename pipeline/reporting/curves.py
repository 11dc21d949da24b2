"""The curves of a run's report, as inline SVG: whatever of them its metrics hold."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from pipeline.runtime.run_log import read_events, read_lines, read_reports
from pipeline.training.metrics import TIMESTEP_BINS

matplotlib.use("svg")
from matplotlib import pyplot

COLOURS = ["#2f6fde", "#e07a2e", "#2a9d6f", "#8a5cd1", "#667085", "#c2387a", "#12a5b8", "#a08a1c"]
MAX_LINES = len(COLOURS)
LEARNED = {"untrained network": "untrained", "trained, captions shuffled": "shuffled", "trained, right captions": "right"}
GATE = re.compile(r"gate_(refiner|collaborative)_(.+)_(\d+)")
BUCKET = re.compile(r"loss_(\d+x\d+)")
SCENES = "scene"
"""How the names of events and numbers begin that tell of scored scene prompts."""
NO_SCORES = ("time", "step", "samples", "seconds")

Line = tuple[list[float], list[float]]
"""x and y."""


def curve(
    title: str,
    note: str,
    lines: dict[str, Line],
    axes: tuple[str, str],
    marks: list[float] | None = None,
    bottom: float | None = None,
    bands: dict[str, Line] | None = None,
) -> dict[str, str]:
    """A plot as inline SVG: `lines` is label -> (x, y); `marks` are x positions of dashed lines; `bands` is label -> (lowest,
    highest) at each x of that line."""
    figure, plot = pyplot.subplots(figsize=(6.2, 3.3))
    for colour, (label, (x, y)) in zip(COLOURS * len(lines), lines.items(), strict=False):
        plot.plot(x, y, label=label, color=colour, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=4)
        if bands and label in bands:
            plot.fill_between(x, *bands[label], color=colour, alpha=0.15, linewidth=0)
    for mark in marks or []:
        plot.axvline(mark, color="#667085", linestyle="--", linewidth=1)
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    if bottom is not None:
        plot.set_ylim(bottom=bottom)
    plot.grid(color="#e4e7ec")
    plot.spines[["top", "right"]].set_visible(False)
    if len(lines) > 4:
        plot.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize="small")
    elif len(lines) > 1:
        plot.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return {"title": title, "note": note, "svg": text.getvalue()[text.getvalue().index("<svg") :]}


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Running mean over `share` of the points."""
    width = max(1, int(len(values) * share))
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def series(rows: Sequence[dict[str, Any]], name: str, smoothed: bool = True) -> Line:
    """One quantity over samples, where it was reported; what a run did twice counts as last done."""
    points = {row["samples"]: row[name] for row in rows if row.get(name) is not None}
    samples = sorted(points)
    values = [points[at] for at in samples]
    return samples, smooth(values) if smoothed else values


def names_in(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of all quantities, in the order in which they first came."""
    return list(dict.fromkeys(name for row in rows for name in row))


def gate_lines(reports: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """A line a block and LLM; where that would be too many, the mean over the blocks."""
    found = {name: match for name in names_in(reports) if (match := GATE.fullmatch(name))}
    if len(found) <= MAX_LINES:
        labels = {f"{kind} {family}, block {int(block) + 1}": name for name, (kind, family, block) in _parts(found)}
        return {label: series(reports, name) for label, name in labels.items()}
    means: dict[str, list[str]] = {}
    for name, (kind, family, _) in _parts(found):
        means.setdefault(f"{kind} {family}, mean of blocks", []).append(name)
    rows = [
        {"samples": row["samples"]} | {label: sum(row[name] for name in names) / len(names) for label, names in means.items()}
        for row in reports
        if all(row.get(name) is not None for name in found)
    ]
    return {label: series(rows, label) for label in means}


def _parts(found: dict[str, re.Match[str]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, match.groups()) for name, match in found.items()]


def bucket_lines(reports: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """A line for each of the buckets that came most often."""
    lines = {match[1]: series(reports, name) for name in names_in(reports) if (match := BUCKET.fullmatch(name))}
    often = sorted(lines, key=lambda bucket: len(lines[bucket][0]), reverse=True)[:MAX_LINES]
    return {bucket: line for bucket, line in lines.items() if bucket in often}


def scene_lines(run: Path) -> dict[str, Line]:
    """Scores of scene prompts: numbers named so in any line, and all of an event named so."""
    rows = []
    for row in read_lines(run):
        of_scenes = row.get("event", "").startswith(SCENES)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name not in NO_SCORES}
        scores = {name: value for name, value in numbers.items() if of_scenes or name.startswith(SCENES)}
        if scores:
            rows.append(scores | {"samples": row["samples"]})
    return {name: series(rows, name, smoothed=False) for name in names_in(rows) if name != "samples"}


def curves_of(run: Path) -> list[dict[str, str]]:
    """Losses, scores, gates, gradient norm and speed over samples: those that the run has reported."""
    reports = read_reports(run)
    if not reports:
        return []
    restarts = [event["samples"] for event in read_events(run, "start")[1:]]
    bins = {f"t {i / TIMESTEP_BINS:.2f}-{(i + 1) / TIMESTEP_BINS:.2f}": f"loss_t{i}" for i in range(TIMESTEP_BINS)}
    validation, buckets = series(read_events(run, "validation"), "loss", smoothed=False), bucket_lines(reports)
    goodput = {"goodput": series(reports, "goodput")}
    plots: list[tuple[str, str, dict[str, Line], str, float | None]] = [
        ("Training loss", "Running mean. Dashed: stopped and resumed.", {"loss": series(reports, "loss")}, "loss", None),
        (
            "Loss by timestep",
            f"Mean in each {TIMESTEP_BINS}th of t; t = 1 is pure noise.",
            {label: series(reports, name) for label, name in bins.items()},
            "loss",
            None,
        ),
        ("Loss by bucket", "Height x width; those that came most often.", buckets if len(buckets) > 1 else {}, "loss", None),
        ("Validation loss", "Held-out pairs, averaged weights, 8 fixed timesteps.", {"": validation}, "loss", None),
        ("Scenes score", "Drawn scene prompts, read back exactly.", scene_lines(run), "score", 0),
        ("Gates", "Mean magnitude of the refiners' gates, which start at zero.", gate_lines(reports), "|gate|", 0),
        ("Gradient norm", "Before clipping.", {"": series(reports, "grad_norm")}, "norm", 0),
        ("Speed", "Samples a second, all processes.", {"": series(reports, "samples_per_second")}, "1/s", 0),
        ("MFU", "FLOPs of the model, recomputation left out, over the devices' peak.", {"": series(reports, "mfu")}, "share", 0),
        ("Goodput", "Time in steps that count over all time since the first start.", goodput, "share", 0),
    ]
    return [
        curve(title, note, there, ("samples", unit), restarts, bottom)
        for title, note, lines, unit, bottom in plots
        if (there := {label: line for label, line in lines.items() if line[0]})
    ]


def learned_curve(record: dict[str, Any]) -> dict[str, str]:
    """The three losses that show what was learned, over fixed timesteps."""
    lines: dict[str, Line] = {name: (record["timesteps"], record[key]) for name, key in LEARNED.items()}
    return curve("Has it learned?", record["note"], lines, ("timestep t (1 = pure noise)", "loss"), bottom=0)
