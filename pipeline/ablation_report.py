"""An ablation's result: `table.md`, and `report.html` with tables, orderings, figure 3's curve and pictures."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from pipeline.ablation import Ablation, Estimate, Unit, orderings, prompt_following
from pipeline.config import StageConfig, dump_stage
from pipeline.report import picture
from pipeline.report_curves import curve

TEMPLATE = Path(__file__).with_name("ablation.html")
POSITION_ROWS = ("a", "a_causal", "a_refiner", "ab_collaborative")
"""Rows of the curve over positions, where they exist; else the first four."""
PICTURES = 8

Scores = dict[str, dict[int, dict[str, Any]]]
"""Row -> seed -> the record in score.json."""


def gather(units: Sequence[Unit]) -> Scores:
    """What has been scored so far."""
    scores: Scores = {}
    for unit in units:
        record = unit.score()
        if record is not None:
            scores.setdefault(unit.row, {})[unit.seed] = record
    return scores


ATTRIBUTES = ("colour", "shape", "size", "texture", "relation", "segment")


def line_of(title: str, paper: float | None, records: dict[int, dict[str, Any]], attributes: Sequence[str]) -> dict[str, Any]:
    """One row of a table, as text."""
    if not records:
        return {
            "title": title,
            "paper": "" if paper is None else f"{paper:.2f}",
            "cells": ["-"] * (2 + len(attributes)),
            "seeds": 0,
        }

    def cell(*path: str) -> str:
        values = []
        for record in records.values():
            value: Any = record
            for key in path:
                value = value[key]
            values.append(value)
        return str(Estimate.of(values))

    losses = [record["loss"] for record in records.values() if record["loss"] is not None]
    loss = "-"
    if losses:
        estimate = Estimate.of(losses)
        loss = f"{estimate.mean:.4f}" + ("" if math.isinf(estimate.half) else f" ± {estimate.half:.4f}")
    cells = [cell("score"), *(cell("attributes", name) for name in attributes), loss]
    return {"title": title, "paper": "" if paper is None else f"{paper:.2f}", "cells": cells, "seeds": len(records)}


def tables_of(ablation: Ablation, scores: Scores, chance: dict[str, float]) -> list[dict[str, Any]]:
    """Tables with their lines, the chance level last, and the orderings that the paper has among them."""
    attributes = [name for name in ATTRIBUTES if name in chance]
    values = {row: {seed: record["score"] for seed, record in records.items()} for row, records in scores.items()}
    held = orderings(ablation, values)
    return [
        {
            "title": title,
            "columns": ["prompt following", *attributes, "validation loss"],
            "lines": [
                *(
                    line_of(ablation.rows[name].title, ablation.rows[name].paper, scores.get(name, {}), attributes)
                    for name in names
                ),
                line_of("chance", None, {0: {"score": prompt_following(chance), "attributes": chance, "loss": None}}, attributes),
            ],
            "orderings": [
                {
                    "text": f"{ablation.rows[pair.better].title} above {ablation.rows[pair.worse].title}",
                    "difference": f"{pair.difference} points",
                    "verdict": pair.verdict,
                }
                for pair in held[title]
            ],
        }
        for title, names in ablation.tables.items()
    ]


def position_curve(ablation: Ablation, scores: Scores) -> dict[str, str] | None:
    """Score over the position of a segment in its caption (the paper's figure 3), mean and 95 % band over seeds."""
    rows = [name for name in POSITION_ROWS if name in scores] or list(scores)[:4]
    lines, bands = {}, {}
    for name in rows:
        longest = min(len(record["positions"]) for record in scores[name].values())
        estimates = [Estimate.of(record["positions"][i] for record in scores[name].values()) for i in range(longest)]
        if not estimates:
            continue
        x = [float(position) for position in range(1, longest + 1)]
        title = ablation.rows[name].title
        lines[title] = (x, [estimate.mean for estimate in estimates])
        halves = [0.0 if math.isinf(estimate.half) else estimate.half for estimate in estimates]
        bands[title] = (
            [estimate.mean - half for estimate, half in zip(estimates, halves, strict=True)],
            [estimate.mean + half for estimate, half in zip(estimates, halves, strict=True)],
        )
    if not lines:
        return None
    note = "Share of segments drawn right, by their position in the caption; bands: 95 % over seeds (paper, figure 3)."
    return curve("Positional bias", note, lines, ("position of the segment", "score"), bottom=0.0, bands=bands)


def markdown(tables: Sequence[dict[str, Any]], left_out: Sequence[str], cost: str) -> str:
    """The tables as text."""
    parts = []
    for table in tables:
        columns = ["row", "paper", *table["columns"], "seeds"]
        parts += [f"### {table['title']}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        parts += [
            "| " + " | ".join([line["title"], line["paper"] or "-", *line["cells"], str(line["seeds"])]) + " |"
            for line in table["lines"]
        ]
        parts += ["", *(f"- {pair['text']}: {pair['difference']}, **{pair['verdict']}**" for pair in table["orderings"]), ""]
    parts += [f"Left out: {reason}." for reason in left_out]
    return "\n".join([*parts, cost, ""])


def build(
    folder: Path, stage: StageConfig, ablation: Ablation, units: Sequence[Unit], left_out: Sequence[str], chance: dict[str, float]
) -> Path:
    """Write `table.md` and `report.html` into `folder` from what has been scored, beside the chance level of the prompts.

    Returns:
        The page's path.
    """
    scores = gather(units)
    done = [record for records in scores.values() for record in records.values()]
    hours = sum(record["seconds"] for record in done) / 3600
    cost = f"{len(done)} of {len(units)} runs of {stage.samples:,} samples done, {hours:.2f} hours of one run at a time."
    tables = tables_of(ablation, scores, chance)
    pictures = []
    for unit in units:
        drawn = sorted((unit.run / "scenes").glob("*.png")) if unit.seed == 0 and unit.row in scores else []
        images = [picture(path) for path in drawn if path.name != "grid.png"][:PICTURES]
        if images:
            pictures.append({"title": ablation.rows[unit.row].title, "images": images})
    prompts_file = next((unit.run / "prompts.txt" for unit in units if unit.row in scores), None)
    prompts = prompts_file.read_text(encoding="utf-8").splitlines()[:PICTURES] if prompts_file is not None else []
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(tables, left_out, cost), encoding="utf-8")
    out = folder / "report.html"
    out.write_text(
        page.render(
            name=folder.name,
            written=time.strftime("%Y-%m-%d %H:%M"),
            cost=cost,
            tables=tables,
            curve=position_curve(ablation, scores),
            pictures=pictures,
            prompts=prompts,
            left_out=left_out,
            stage=dump_stage(stage),
        ),
        encoding="utf-8",
    )
    return out
