"""One self-contained HTML page of a run, at any time: pictures, curves, data, starts and stops, settings.

python -m pipeline.report runs/demo
"""

import argparse
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from model.errors import command
from pipeline.config import dump_stage, load_run
from pipeline.metrics import TIMESTEP_BINS, read_events, read_reports

matplotlib.use("svg")
from matplotlib import pyplot

TEMPLATE = Path(__file__).with_name("report.html")
COLOURS = ["#2f6fde", "#e07a2e", "#2a9d6f", "#8a5cd1", "#667085"]


def picture(path: Path) -> str:
    """A PNG as a data URI, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def curve(
    title: str,
    note: str,
    lines: dict[str, tuple[list[float], list[float]]],
    axes: tuple[str, str],
    marks: list[float] | None = None,
    bottom: float | None = None,
    bands: dict[str, tuple[list[float], list[float]]] | None = None,
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
    if len(lines) > 1:
        plot.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return {"title": title, "note": note, "svg": text.getvalue()[text.getvalue().index("<svg") :]}


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Running mean over `share` of the points."""
    width = max(1, int(len(values) * share))
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def curves_of(run: Path) -> list[dict[str, str]]:
    """Loss, loss by timestep, gradient norm and speed over samples."""
    reports = read_reports(run)
    if not reports:
        return []
    samples = [report["samples"] for report in reports]
    restarts = [event["samples"] for event in read_events(run, "start")[1:]]

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(report["samples"], report[name]) for report in reports if report.get(name) is not None]
        return [x for x, _ in points], smooth([y for _, y in points])

    curves = [
        curve(
            "Training loss",
            "Running mean. Dashed: stopped and resumed.",
            {"loss": series("loss")},
            ("samples", "loss"),
            restarts,
        ),
        curve(
            "Loss by timestep",
            f"Mean in each {TIMESTEP_BINS}th of t; t = 1 is pure noise.",
            {f"t {i / TIMESTEP_BINS:.2f}-{(i + 1) / TIMESTEP_BINS:.2f}": series(f"loss_t{i}") for i in range(TIMESTEP_BINS)},
            ("samples", "loss"),
        ),
    ]
    validations = read_events(run, "validation")
    if validations:
        points = ([event["samples"] for event in validations], [event["loss"] for event in validations])
        curves.append(
            curve("Validation loss", "Held-out pairs, averaged weights, 8 fixed timesteps.", {"": points}, ("samples", "loss"))
        )
    if len(samples) > 1:
        curves.append(curve("Gradient norm", "Before clipping.", {"": series("grad_norm")}, ("samples", "norm"), bottom=0))
        curves.append(
            curve("Speed", "Samples a second, all processes.", {"": series("samples_per_second")}, ("samples", "1/s"), bottom=0)
        )
    return curves


def learned_curve(record: dict[str, Any]) -> dict[str, str]:
    """The three losses that show what was learned, over fixed timesteps."""
    steps = record["timesteps"]
    lines = {name: (steps, record[key]) for name, key in LEARNED.items()}
    return curve("Has it learned?", record["note"], lines, ("timestep t (1 = pure noise)", "loss"), bottom=0)


LEARNED = {"untrained network": "untrained", "trained, captions shuffled": "shuffled", "trained, right captions": "right"}


def table_of_events(run: Path) -> list[dict[str, Any]]:
    """Starts, stops, and at most the last few saves."""
    events = [event for event in read_events(run) if event["event"] in ("start", "stop", "save", "skipped")]
    saves = [event for event in events if event["event"] == "save"][-4:]
    kept = [event for event in events if event["event"] in ("start", "stop") or event in saves]
    return [
        {
            "when": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])),
            "what": event["event"],
            "step": f"{event['step']:,}",
            "samples": f"{event.get('samples', 0):,}",
            "detail": event.get("how") or event.get("reason") or f"training stood still for {event.get('seconds', 0):.2f} s",
        }
        for event in kept
    ]


def tiles_of(run: Path, extra: dict[str, Any]) -> list[dict[str, str]]:
    """The key numbers."""
    reports, tiles = read_reports(run), []
    if reports:
        last = reports[-1]
        speed = sum(report["samples_per_second"] for report in reports) / len(reports)
        tiles += [
            {"label": "samples seen", "value": f"{last['samples']:,}"},
            {"label": "samples/s in training", "value": f"{speed:.0f}"},
            {"label": "training loss at the end", "value": f"{last['loss']:.3f}"},
        ]
        if "mfu" in last:
            tiles.append({"label": "MFU", "value": f"{last['mfu']:.1%}"})
        tiles.append({"label": "stops that it came back from", "value": str(len(read_events(run, "start")) - 1)})
    return tiles + extra.get("tiles", [])


def build(run: Path) -> Path:
    """Write `<run>/report.html`.

    Raises:
        UserError: the folder is not a run's.
    """
    stage = load_run(run)
    extra_file = run / "report_extra.json"
    extra = json.loads(extra_file.read_text()) if extra_file.exists() else {}
    longest = max((phase["seconds"] for phase in extra.get("phases", [])), default=1.0)
    curves = curves_of(run)
    if "learned" in extra:
        curves.insert(0, learned_curve(extra["learned"]))
    finished = (run / "finished.json").exists()
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    html = page.render(
        name=run.name,
        written=time.strftime("%Y-%m-%d %H:%M"),
        state="The stage is finished." if finished else "The stage is not finished.",
        tiles=tiles_of(run, extra),
        pictures=[
            {
                "caption": p["caption"],
                "drawn": picture(run / p["drawn"]),
                "real": picture(run / p["real"]) if p.get("real") else "",
            }
            for p in extra.get("pictures", [])
        ],
        pictures_note=extra.get("pictures_note", ""),
        slides=[
            {"image": picture(path), "label": f"after {int(path.stem.split('_')[-1]):,} samples"}
            for path in sorted((run / "grids").glob("samples_*.png"))
        ],
        curves=curves,
        phases=[{**phase, "share": 100 * phase["seconds"] / longest} for phase in extra.get("phases", [])],
        families=extra.get("families", []),
        data_note=extra.get("data_note", ""),
        events=table_of_events(run),
        stage=dump_stage(stage),
        licences=extra.get("licences", ""),
    )
    out = run / "report.html"
    out.write_text(html)
    return out


@command
def main() -> None:
    """Entry of `python -m pipeline.report`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/demo")
    print(build(parser.parse_args().run))


if __name__ == "__main__":
    main()
