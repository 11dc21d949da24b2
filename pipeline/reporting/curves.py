"""The curves of a run's report as inline SVG, as far as its metrics contain them."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from pipeline.runtime.run_log import read_events, read_lines, read_reports
from pipeline.training.metrics import TIMESTEP_BINS

matplotlib.use("svg")
# after the backend is chosen, so that pyplot never looks for a display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# the same data give the same file
matplotlib.rcParams["svg.hashsalt"] = "li-dit"
COLORS = ["#2f6fde", "#e07a2e", "#2a9d6f", "#8a5cd1", "#667085", "#c2387a", "#12a5b8", "#a08a1c"]
MAX_LINES = len(COLORS)
LEARNED = {
    "untrained network": "untrained",
    "trained, captions shuffled": "shuffled",
    "trained, right captions": "right",
}
GATE = re.compile(r"gate_(refiner|collaborative)_(.+)_(\d+)")
CORRELATION = re.compile(r"rank_correlation_t([\d.]+)")
BUCKET = re.compile(r"loss_(\d+x\d+)")
PART = re.compile(r"depth\d+(_patch\d+)?")
"""Name of a part of an elastic network."""
SCENES = "scene"
"""Prefix of events and metrics about scored scene prompts."""
NO_SCORES = ("time", "step", "samples", "seconds")

Line = tuple[list[float], list[float]]
"""x and y."""


class Plot(NamedTuple):
    """The data of one curve over samples."""

    title: str
    note: str
    lines: dict[str, Line]
    """Label -> line; lines without points are left out."""
    unit: str
    bottom: float | None = None


def curve(
    title: str,
    note: str,
    lines: dict[str, Line],
    axes: tuple[str, str],
    marks: list[float] | None = None,
    bottom: float | None = None,
    bands: dict[str, Line] | None = None,
    level: float | None = None,
) -> dict[str, str]:
    """Plot lines as inline SVG.

    Args:
        title: heading of the plot.
        note: text below the heading.
        lines: label -> line.
        axes: labels of the axes.
        marks: x positions of dashed vertical lines.
        bottom: lower limit of y; None = automatic.
        bands: label -> lower and upper limit at each x of that line.
        level: y position of a dashed horizontal line.
    """
    figure, plot = pyplot.subplots(figsize=(6.2, 3.3))
    # colors repeat when there are more lines than colors
    for color, (label, (x, y)) in zip(COLORS * len(lines), lines.items(), strict=False):
        # a single point would be invisible as a line
        marker = "o" if len(x) < 12 else None
        plot.plot(x, y, label=label, color=color, linewidth=1.6, marker=marker, markersize=4)
        if bands and label in bands:
            plot.fill_between(x, *bands[label], color=color, alpha=0.15, linewidth=0)
    for mark in marks or []:
        plot.axvline(mark, color="#667085", linestyle="--", linewidth=1)
    if level is not None:
        plot.axhline(level, color="#667085", linestyle="--", linewidth=1)

    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    if bottom is not None:
        plot.set_ylim(bottom=bottom)
    style(plot)
    # a long legend would cover the lines
    if len(lines) > 4:
        plot.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize="small")
    elif len(lines) > 1:
        plot.legend(frameon=False)

    return {"title": title, "note": note, "svg": to_svg(figure)}


def style(plot: Axes) -> None:
    """Draw a plot's grid, and no frame above and to the right of it."""
    plot.grid(color="#e4e7ec")
    plot.spines[["top", "right"]].set_visible(False)


def to_svg(figure: Figure) -> str:
    """Return a figure of pyplot as inline SVG, and close it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    # pyplot keeps every open figure in memory
    pyplot.close(figure)
    # without the XML header, so that HTML can contain it
    svg = text.getvalue()

    return svg[svg.index("<svg") :]


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Return the running mean over `share` of the points."""
    width = max(1, int(len(values) * share))
    means: list[float] = []
    for end in range(1, len(values) + 1):
        # the past only, so that a point does not change when training goes on
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


def series(rows: Sequence[dict[str, Any]], name: str, smoothed: bool = True) -> Line:
    """Return one quantity over samples, as far as it was reported; repeated steps count as last reported."""
    points = {row["samples"]: row[name] for row in rows if row.get(name) is not None}
    samples = sorted(points)
    values = [points[sample] for sample in samples]
    return samples, smooth(values) if smoothed else values


def names_in(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all quantities, in the order in which they first appear."""
    return list(dict.fromkeys(chain.from_iterable(rows)))


def gate_lines(reports: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """Return one line per block and LLM or, if these are too many, the mean over the blocks of each LLM."""
    gates = {name: match.groups() for name in names_in(reports) if (match := GATE.fullmatch(name))}
    if len(gates) <= MAX_LINES:
        lines: dict[str, Line] = {}
        for name, (kind, family, block) in gates.items():
            lines[f"{kind} {family}, block {int(block) + 1}"] = series(reports, name)
        return lines

    blocks: dict[str, list[str]] = {}
    for name, (kind, family, _) in gates.items():
        blocks.setdefault(f"{kind} {family}, mean of blocks", []).append(name)

    means: list[dict[str, Any]] = []
    for report in reports:
        # a report without all gates has no mean
        if all(report.get(name) is not None for name in gates):
            mean = {"samples": report["samples"]}
            for label, names in blocks.items():
                mean[label] = sum(report[name] for name in names) / len(names)
            means.append(mean)

    return {label: series(means, label) for label in blocks}


def bin_lines(rows: Sequence[dict[str, Any]], smoothed: bool = True) -> dict[str, Line]:
    """Return one line for the losses in each bin of timesteps."""
    lines: dict[str, Line] = {}
    for i in range(TIMESTEP_BINS):
        label = f"t {i / TIMESTEP_BINS:.2f}-{(i + 1) / TIMESTEP_BINS:.2f}"
        lines[label] = series(rows, f"loss_t{i}", smoothed)
    return lines


def correlation_lines(rows: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """Return one line for each time at which the difficulty head is compared with the true errors."""
    lines: dict[str, Line] = {}
    for name in names_in(rows):
        if match := CORRELATION.fullmatch(name):
            lines[f"t {float(match[1]):.2f}"] = series(rows, name, smoothed=False)
    return lines


def bucket_lines(reports: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """Return one line for each of the most frequent buckets."""
    lines: dict[str, Line] = {}
    for name in names_in(reports):
        if match := BUCKET.fullmatch(name):
            lines[match[1]] = series(reports, name)
    # rare buckets have noisy lines, and many lines hide each other
    frequent = sorted(lines, key=lambda bucket: len(lines[bucket][0]), reverse=True)[:MAX_LINES]
    return {bucket: line for bucket, line in lines.items() if bucket in frequent}


def part_lines(rows: Sequence[dict[str, Any]], smoothed: bool = True) -> dict[str, Line]:
    """Return one line for the loss of each part of an elastic network."""
    lines: dict[str, Line] = {}
    for name in names_in(rows):
        if PART.fullmatch(part := name.removeprefix("loss_")):
            lines[part] = series(rows, name, smoothed)
    return lines


def scene_lines(run: Path) -> dict[str, Line]:
    """Return the scores of scene prompts: numbers with the prefix, and numbers of events with the prefix; of
    the further parts of an elastic network, how well they follow alone."""
    rows: list[dict[str, Any]] = []
    for line in read_lines(run):
        event = line.get("event", "")
        is_scene_event = event.startswith(SCENES)
        scores: dict[str, float] = {}
        if is_scene_event and PART.fullmatch(part := event.partition("_")[2]):
            # Of the same samples and names as the scores of the default part.
            if "following" in line:
                rows.append({f"following {part}": line["following"], "samples": line["samples"]})
            continue

        for name, value in line.items():
            is_score = isinstance(value, int | float) and name not in NO_SCORES
            if is_score and (is_scene_event or name.startswith(SCENES)):
                scores[name] = value
        if scores:
            rows.append({**scores, "samples": line["samples"]})

    return {name: series(rows, name, smoothed=False) for name in names_in(rows) if name != "samples"}


def curves_of(run: Path) -> list[dict[str, str]]:
    """Return losses, scores, gates, gradient norm and speed over samples, as far as they were reported."""
    reports = read_reports(run)
    if not reports:
        return []

    # the first start is no restart
    restarts = [event["samples"] for event in read_events(run, "start")[1:]]
    curves: list[dict[str, str]] = []
    for plot in _plots(run, reports):
        # a plot without any line is left out of the page
        lines = {label: line for label, line in plot.lines.items() if line[0]}
        if lines:
            axes = ("samples", plot.unit)
            curves.append(curve(plot.title, plot.note, lines, axes, restarts, plot.bottom))

    return curves


def _plots(run: Path, reports: Sequence[dict[str, Any]]) -> list[Plot]:
    def line(name: str) -> dict[str, Line]:
        return {"": series(reports, name)}

    buckets = bucket_lines(reports)
    validation = series(read_events(run, "validation"), "loss", smoothed=False)
    patches = read_events(run, "patches")

    return [
        Plot("Training loss", "Running mean. Dashed: stopped and resumed.", line("loss"), "loss"),
        Plot(
            "Loss by timestep",
            f"Mean in each {TIMESTEP_BINS}th of t; t = 1 is pure noise.",
            bin_lines(reports),
            "loss",
        ),
        Plot(
            "Loss by bucket",
            "Height x width; the most frequent buckets.",
            buckets if len(buckets) > 1 else {},
            "loss",
        ),
        Plot(
            "Validation loss",
            "Held-out pairs, averaged weights, 8 fixed timesteps.",
            {"": validation},
            "loss",
        ),
        Plot("Loss by part", "Of an elastic network.", part_lines(reports), "loss"),
        Plot(
            "Validation loss by part",
            "Held-out pairs, averaged weights, 8 fixed timesteps.",
            part_lines(read_events(run, "elastic"), smoothed=False),
            "loss",
        ),
        Plot(
            "Validation loss of patches",
            "Held-out pairs at times as in training, by the time of each patch.",
            bin_lines(patches, smoothed=False),
            "loss",
        ),
        Plot(
            "Difficulty of patches",
            "Spearman's correlation of expected and true errors of an image's patches, held-out pairs.",
            correlation_lines(patches),
            "correlation",
        ),
        Plot("Scenes score", "Images of scene prompts, scored exactly.", scene_lines(run), "score", 0),
        Plot(
            "Gates",
            "Mean magnitude of the refiners' gates, which start at zero.",
            gate_lines(reports),
            "|gate|",
            0,
        ),
        Plot("Gradient norm", "Before clipping.", line("grad_norm"), "norm", 0),
        Plot("Speed", "Samples per second, all processes.", line("samples_per_second"), "1/s", 0),
        Plot(
            "MFU",
            "FLOPs of the model without recomputation, divided by the devices' peak.",
            line("mfu"),
            "share",
            0,
        ),
        Plot(
            "Goodput",
            "Time in steps that count, divided by all time since the first start.",
            line("goodput"),
            "share",
            0,
        ),
    ]


def learned_curve(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the three losses that show what the network learned, over fixed timesteps."""
    lines: dict[str, Line] = {name: (record["timesteps"], record[key]) for name, key in LEARNED.items()}
    axes = ("timestep t (1 = pure noise)", "loss")
    return curve("Has it learned?", record["note"], lines, axes, bottom=0)
