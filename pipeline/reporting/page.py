"""The self-contained HTML page of a run."""

import base64
import time
from pathlib import Path
from typing import Any

import jinja2

from model.common.errors import UserError
from pipeline.operations.attempts import read_endings
from pipeline.reporting.curves import curves_of, learned_curve
from pipeline.reporting.data import describe_data
from pipeline.reporting.extra import Extra, Tile, read_extra
from pipeline.runtime.finished import FINISHED
from pipeline.runtime.run_log import read_events, read_reports
from pipeline.stage.config import dump_stage, load_run

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SAVES = 4
"""Maximum number of saves in the table of events."""


def inline_image(path: Path) -> str:
    """Return a PNG or WebP as a data URI, so that the page needs no other file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, and the report shows it: generate it again") from error
    kind = "webp" if path.suffix == ".webp" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def list_events(run: Path) -> list[dict[str, Any]]:
    """Return starts, stops, the last saves, and how each attempt of a cluster job ended, by time."""
    events = read_events(run)
    shown = [event for event in events if event["event"] in ("start", "stop")]
    # a run of weeks has thousands of saves
    shown += [event for event in events if event["event"] == "save"][-MAX_SAVES:]

    rows: list[dict[str, Any]] = []
    for event in shown:
        # a start has `how`, a stop has `reason`, a save has neither
        detail = event.get("how") or event.get("reason") or f"training paused for {event['seconds']:.2f} s"
        rows.append(
            {
                "time": event["time"],
                "what": event["event"],
                "step": f"{event['step']:,}",
                "samples": f"{event['samples']:,}",
                "detail": detail,
            }
        )
    for ending in read_endings(run):
        requeued = "; queued again" if ending.requeued else ""
        rows.append(
            {
                "time": ending.ended,
                "what": f"end of job {ending.job}.{ending.restart}: {ending.kind}",
                "step": f"{ending.step:,}",
                "samples": "",
                "detail": f"{ending.reason}; on {ending.nodes}{requeued}",
            }
        )

    rows.sort(key=lambda row: row["time"])
    for row in rows:
        row["when"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))

    return rows


def make_tiles(run: Path, extra: Extra) -> list[Tile]:
    """Return the key numbers."""
    reports = read_reports(run)
    tiles: list[Tile] = []
    if reports:
        last = reports[-1]
        speed = sum(report["samples_per_second"] for report in reports) / len(reports)
        tiles = [
            {"label": "samples seen", "value": f"{last['samples']:,}"},
            {"label": "samples/s in training", "value": f"{speed:.0f}"},
            {"label": "training loss at the end", "value": f"{last['loss']:.3f}"},
        ]
        for name, label in (("mfu", "MFU"), ("goodput", "goodput")):
            if last.get(name) is not None:
                tiles.append({"label": label, "value": f"{last[name]:.1%}"})
        if last.get("skipped"):
            tiles.append({"label": "steps skipped for their gradients", "value": f"{last['skipped']:.0f}"})
        # the first start is no resume
        resumed = len(read_events(run, "start")) - 1
        tiles.append({"label": "times stopped and resumed", "value": str(resumed)})

    return tiles + extra.get("tiles", [])


def build(run: Path) -> Path:
    """Write `<run>/report.html` and return its path.

    Raises:
        UserError: if the folder is not a run's.
    """
    stage = load_run(run)
    extra = read_extra(run)

    phases = extra.get("phases", [])
    # the bars of the phases are relative to the longest one
    longest = max((phase["seconds"] for phase in phases), default=1.0)
    curves = curves_of(run)
    # the demo adds it; other runs are not compared with an untrained network
    if "learned" in extra:
        curves.insert(0, learned_curve(extra["learned"]))

    images: list[dict[str, Any]] = []
    for image in extra.get("pictures", []):
        real_file = image.get("real")
        real = inline_image(run / real_file) if real_file else ""
        generated = inline_image(run / image["drawn"])
        marks = image.get("marks", [])
        images.append({"caption": image["caption"], "marks": marks, "generated": generated, "real": real})

    slides: list[dict[str, str]] = []
    for path in sorted((run / "grids").glob("samples_*.png")):
        # the number of samples is part of the file's name
        samples = int(path.stem.split("_")[-1])
        # a grid of clips is there twice: as frames side by side, and moving
        moving = path.with_suffix(".webp")
        shown = inline_image(moving if moving.exists() else path)
        slides.append({"image": shown, "label": f"after {samples:,} samples"})

    # escaped, since captions and settings are text from outside
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    finished = (run / FINISHED).exists()
    html = page.render(
        name=run.name,
        written=time.strftime("%Y-%m-%d %H:%M"),
        state="The stage is finished." if finished else "The stage is not finished.",
        tiles=make_tiles(run, extra),
        images=images,
        images_note=extra.get("pictures_note", ""),
        slides=slides,
        curves=curves,
        phases=[{**phase, "share": 100 * phase["seconds"] / longest} for phase in phases],
        data=describe_data(stage),
        events=list_events(run),
        stage=dump_stage(stage),
        licenses=extra.get("licences", ""),
    )
    out = run / "report.html"
    out.write_text(html)

    return out
