"""An ablation's result: `table.md`, and `report.html` with tables, orderings, figure 3's curve and pictures."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.ablation.rows import Ablation, SeedMean, Job, orderings
from pipeline.evaluation.images import write_whole
from pipeline.following.positional_bias import PositionalBias, positional_bias
from pipeline.following.scoring import prompt_following
from pipeline.reporting.curves import curve
from pipeline.reporting.pages import inline_png
from pipeline.stage.config import StageConfig, dump_stage

TEMPLATE = Path(__file__).with_name("report.html")
POSITION_ROWS = ("a", "a_causal", "a_refiner", "ab_collaborative")
"""Rows of the curve over positions, where they exist; else the first four."""
PICTURES = 8

Scores = dict[str, dict[int, dict[str, Any]]]
"""Row -> seed -> the record in score.json."""


def gather(jobs: Sequence[Job]) -> Scores:
    """What has been scored so far."""
    scores: Scores = {}
    for job in jobs:
        record = job.score()
        if record is not None:
            scores.setdefault(job.row, {})[job.seed] = record
    return scores


ATTRIBUTES = ("colour", "shape", "size", "texture", "relation", "segment")


def line_of(title: str, paper: float | None, records: dict[int, dict[str, Any]], attributes: Sequence[str]) -> dict[str, Any]:
    """One row of a table, as text; `-` for what has not been measured."""
    found = list(records.values())
    shares = [[each["score"] for each in found], *([each["attributes"][name] for each in found] for name in attributes)]
    losses = [each["loss"] for each in found if each["loss"] is not None]
    cells = [str(SeedMean.of(values)) if values else "-" for values in shares]
    cells.append(SeedMean.of(losses).text(1, 4) if losses else "-")
    return {"title": title, "paper": "" if paper is None else f"{paper:.2f}", "cells": cells, "seeds": len(records)}


def tables_of(ablation: Ablation, scores: Scores) -> list[dict[str, Any]]:
    """Tables with their lines, the rows' mean chance level last, and the orderings that the paper has among them."""
    records = [record for row in scores.values() for record in row.values()]
    attributes = [name for name in ATTRIBUTES if any(name in record["attributes"] for record in records)]
    means = {name: float(np.mean([record["chance"][name] for record in records])) for name in attributes}
    chance = {0: {"score": prompt_following(means), "attributes": means, "loss": None}} if records else {}
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
                line_of("chance", None, chance, attributes),
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


def positional_biases(ablation: Ablation, scores: Scores) -> dict[str, PositionalBias]:
    """Title -> figure 3's curve of some rows, each segment's score being the mean over the seeds."""
    biases = {}
    for name in [name for name in POSITION_ROWS if name in scores] or list(scores)[:4]:
        by_seed = [record["segments"] for record in scores[name].values()]
        means = [np.mean(segments, axis=0).tolist() for segments in zip(*by_seed, strict=True)]
        if any(len(each) > 1 for each in means):
            biases[ablation.rows[name].title] = positional_bias(means)
    return biases


def position_curve(biases: dict[str, PositionalBias]) -> dict[str, str]:
    """The paper's figure 3."""
    lines = {title: (bias.positions, [point.mean for point in bias.curve]) for title, bias in biases.items()}
    bands = {title: ([point.low for point in bias.curve], [point.high for point in bias.curve]) for title, bias in biases.items()}
    note = "Share of right claims by where in the prompt a segment stands, mean over the seeds; bands: 95 % over prompts."
    return curve("Positional bias", note, lines, ("relative position in the prompt", "score"), bottom=0.0, bands=bands)


def markdown(tables: Sequence[dict[str, Any]], biases: dict[str, PositionalBias], left_out: Sequence[str], cost: str) -> str:
    """The tables and the positional bias as text."""
    parts = []
    for table in tables:
        columns = ["row", "paper", *table["columns"], "seeds"]
        parts += [f"### {table['title']}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        parts += [
            "| " + " | ".join([line["title"], line["paper"] or "-", *line["cells"], str(line["seeds"])]) + " |"
            for line in table["lines"]
        ]
        parts += ["", *(f"- {pair['text']}: {pair['difference']}, **{pair['verdict']}**" for pair in table["orderings"]), ""]
    if biases:
        parts += ["### Positional bias (figure 3)", "", *(f"- {title}: {bias}" for title, bias in biases.items()), ""]
    parts += [f"Left out: {reason}." for reason in left_out]
    return "\n".join([*parts, cost, ""])


def build(folder: Path, stage: StageConfig, ablation: Ablation, jobs: Sequence[Job], left_out: Sequence[str]) -> Path:
    """Write `table.md` and `report.html` into `folder` from what has been scored.

    Returns:
        The page's path.
    """
    scores = gather(jobs)
    done = [record for records in scores.values() for record in records.values()]
    hours = sum(record["seconds"] for record in done) / 3600
    cost = f"{len(done)} of {len(jobs)} runs of {stage.samples:,} samples done, {hours:.2f} hours of one run at a time."
    tables, biases = tables_of(ablation, scores), positional_biases(ablation, scores)
    pictures = []
    for job in jobs:
        drawn = sorted((job.run / "scenes").glob("*.png")) if job.seed == 0 and job.row in scores else []
        images = [inline_png(path) for path in drawn if path.name != "grid.png"][:PICTURES]
        if images:
            pictures.append({"title": ablation.rows[job.row].title, "images": images})
    prompts_file = next((job.prompts for job in jobs if job.row in scores), None)
    prompts = prompts_file.read_text(encoding="utf-8").splitlines()[:PICTURES] if prompts_file is not None else []
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    write_whole(folder / "table.md", markdown(tables, biases, left_out, cost).encode())
    text = page.render(
        name=folder.name,
        written=time.strftime("%Y-%m-%d %H:%M"),
        cost=cost,
        tables=tables,
        curve=position_curve(biases) if biases else None,
        biases=biases,
        pictures=pictures,
        prompts=prompts,
        left_out=left_out,
        stage=dump_stage(stage),
    )
    write_whole(folder / "report.html", text.encode())
    return folder / "report.html"
