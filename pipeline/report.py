"""One self-contained HTML page of a run, at any time: pictures, curves, data, starts and stops, settings.

python -m pipeline.report runs/demo
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jinja2

from model.common.errors import command
from pipeline.operations.attempts import read_endings
from pipeline.reporting.curves import curves_of, learned_curve
from pipeline.reporting.data import data_of
from pipeline.reporting.pages import inline_png
from pipeline.runtime.run_log import read_events, read_reports
from pipeline.stage.config import dump_stage, load_run

TEMPLATE = Path(__file__).parent / "reporting" / "report.html"


def table_of_events(run: Path) -> list[dict[str, Any]]:
    """Starts, stops, at most the last few saves, and how each attempt of a cluster job ended, by time."""
    events = read_events(run)
    kept = [event for event in events if event["event"] in ("start", "stop")]
    kept += [event for event in events if event["event"] == "save"][-4:]
    rows = [
        {
            "time": event["time"],
            "what": event["event"],
            "step": f"{event['step']:,}",
            "samples": f"{event['samples']:,}",
            "detail": event.get("how") or event.get("reason") or f"training stood still for {event['seconds']:.2f} s",
        }
        for event in kept
    ]
    rows += [
        {
            "time": ending.ended,
            "what": f"end of job {ending.job}.{ending.restart}: {ending.kind}",
            "step": f"{ending.step:,}",
            "samples": "",
            "detail": f"{ending.reason}; on {ending.nodes}{'; queued again' if ending.requeued else ''}",
        }
        for ending in read_endings(run)
    ]
    rows.sort(key=lambda row: row["time"])
    return [row | {"when": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))} for row in rows]


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
        tiles += [
            {"label": label, "value": f"{last[name]:.1%}"}
            for name, label in (("mfu", "MFU"), ("goodput", "goodput"))
            if last.get(name) is not None
        ]
        if last.get("skipped"):
            tiles.append({"label": "steps skipped for their gradients", "value": f"{last['skipped']:.0f}"})
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
                "drawn": inline_png(run / p["drawn"]),
                "real": inline_png(run / p["real"]) if p.get("real") else "",
            }
            for p in extra.get("pictures", [])
        ],
        pictures_note=extra.get("pictures_note", ""),
        slides=[
            {"image": inline_png(path), "label": f"after {int(path.stem.split('_')[-1]):,} samples"}
            for path in sorted((run / "grids").glob("samples_*.png"))
        ],
        curves=curves,
        phases=[{**phase, "share": 100 * phase["seconds"] / longest} for phase in extra.get("phases", [])],
        data=data_of(stage),
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
