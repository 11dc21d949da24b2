"""The result of an ablation: `table.md`, `positions.svg`, and `report.html` with both and images."""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from model.common.files import write_atomic
from pipeline.ablation.paired import Difference
from pipeline.ablation.positions import position_figure, positional_biases
from pipeline.ablation.rows import Ablation, Job, Ordering, Score, SeedMean, orderings
from pipeline.following.contrast import CONTRASTS
from pipeline.following.positional_bias import PositionalBias
from pipeline.following.scoring import prompt_following
from pipeline.reporting.page import inline_image
from pipeline.stage.config import StageConfig, dump_stage

TEMPLATE = Path(__file__).with_name("report.html")
PLANNED_HALF = 0.01
"""Half width of an interval for which the report says how many seeds it takes."""
MAX_IMAGES = 8
"""Maximum number of images per row."""
ATTRIBUTES = ("colour", "shape", "size", "texture", "relation", "segment")

Scores = dict[str, dict[int, Score]]
"""Row -> seed -> the record in score.json."""


def gather(jobs: Sequence[Job]) -> Scores:
    """Return the results so far."""
    scores: Scores = {}
    for job in jobs:
        record = job.score()
        if record is not None:
            scores.setdefault(job.row, {})[job.seed] = record
    return scores


def make_line(
    title: str,
    paper: float | None,
    records: dict[int, Score],
    attributes: Sequence[str],
    contrasts: Sequence[str],
) -> dict[str, Any]:
    """Return one row of a table as text, with `-` for what has not been measured."""
    shares = [[record["score"] for record in records.values()]]
    for name in attributes:
        shares.append([record["attributes"][name] for record in records.values()])
    for kind in contrasts:
        measured = [record["contrast"][kind] for record in records.values() if "contrast" in record]
        shares.append([float(np.mean(values)) for values in measured if values])
    cells = [str(SeedMean.of(values)) if values else "-" for values in shares]

    losses = [record["loss"] for record in records.values() if record["loss"] is not None]
    # a loss is not a share, so it is not shown in percent
    cells.append(SeedMean.of(losses).text(1, 4) if losses else "-")

    return {
        "title": title,
        "paper": "" if paper is None else f"{paper:.2f}",
        "cells": cells,
        "seeds": len(records),
    }


def make_tables(ablation: Ablation, scores: Scores) -> list[dict[str, Any]]:
    """Return the tables: rows, then the rows' mean chance level, and the paper's orderings of the rows."""
    records = list(chain.from_iterable(row.values() for row in scores.values()))
    # scenes of one segment have no relations, for example
    measured = set(chain.from_iterable(record["attributes"] for record in records))
    attributes = [name for name in ATTRIBUTES if name in measured]
    kinds = set(chain.from_iterable(record.get("contrast", {}) for record in records))
    contrasts = [kind for kind in CONTRASTS if kind in kinds]
    columns = ["prompt following", *attributes, *contrasts, "validation loss"]

    means: dict[str, float] = {}
    for name in attributes:
        means[name] = float(np.mean([record["chance"][name] for record in records]))
    chance: dict[int, Score] = {}
    if records:
        chance[0] = {
            "score": prompt_following(means),
            "attributes": means,
            "chance": means,
            "segments": [],
            "loss": None,
        }

    ordered = orderings(ablation, scores)

    tables: list[dict[str, Any]] = []
    for title, names in ablation.tables.items():
        rows = [(ablation.rows[name], scores.get(name, {})) for name in names]
        lines = [make_line(row.title, row.paper, by_seed, attributes, contrasts) for row, by_seed in rows]
        tables.append(
            {
                "title": title,
                "columns": columns,
                "lines": [*lines, make_line("chance", None, chance, attributes, contrasts)],
                "orderings": [_describe(ablation, pair) for pair in ordered[title]],
            }
        )

    return tables


def _describe(ablation: Ablation, pair: Ordering) -> dict[str, str]:
    return {
        "text": f"{ablation.rows[pair.better].title} above {ablation.rows[pair.worse].title}",
        "difference": f"{pair.difference} points",
        "contrast": ", ".join(f"{kind} {each}" for kind, each in pair.contrast.items()),
        "plan": plan_text(pair.difference),
        "verdict": pair.verdict,
    }


def plan_text(difference: Difference) -> str:
    """Return what it would take to decide a difference; empty if it is decided, or for one seed."""
    if difference.decided or difference.spread is None:
        return ""
    seeds = difference.spread.seeds_for(PLANNED_HALF, difference.prompts)
    needed = f"{seeds} seeds" if seeds else "more prompts"
    return f"± {100 * PLANNED_HALF:.0f} point takes {needed}"


def markdown(
    tables: Sequence[dict[str, Any]], biases: dict[str, PositionalBias], left_out: Sequence[str], cost: str
) -> str:
    """Return the tables and the positional bias as text."""
    parts: list[str] = []
    for table in tables:
        columns = ["row", "paper", *table["columns"], "seeds"]
        parts += [f"### {table['title']}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for line in table["lines"]:
            cells = [line["title"], line["paper"] or "-", *line["cells"], str(line["seeds"])]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
        for pair in table["orderings"]:
            plan = f" ({pair['plan']})" if pair["plan"] else ""
            parts.append(f"- {pair['text']}: {pair['difference']}, **{pair['verdict']}**{plan}")
            if pair["contrast"]:
                parts.append(f"  - contrast set: {pair['contrast']}")
        parts.append("")

    if biases:
        parts += ["### Positional bias (figure 3)", ""]
        parts += [f"- {title}: {bias}" for title, bias in biases.items()]
        parts.append("")
    parts += [f"Left out: {reason}." for reason in left_out]

    return "\n".join([*parts, cost, ""])


def _images(ablation: Ablation, jobs: Sequence[Job], scores: Scores) -> list[dict[str, Any]]:
    """Return the first images of each row that has scores, generated by seed 0."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        if job.seed != 0 or job.row not in scores:
            continue
        paths = [path for path in sorted((job.run / "scenes").glob("*.png")) if path.name != "grid.png"]
        if paths:
            images = [inline_image(path) for path in paths[:MAX_IMAGES]]
            rows.append({"title": ablation.rows[job.row].title, "images": images})

    return rows


def build(
    folder: Path, stage: StageConfig, ablation: Ablation, jobs: Sequence[Job], left_out: Sequence[str]
) -> Path:
    """Write `table.md`, `positions.svg` and `report.html` from the results so far.

    Args:
        folder: folder to write to.
        stage: the stage whose settings the rows override.
        ablation: the rows.
        jobs: all runs.
        left_out: a line about each row that cannot be trained.

    Returns:
        Path of the page.
    """
    scores = gather(jobs)
    done = list(chain.from_iterable(row.values() for row in scores.values()))
    hours = sum(record.get("seconds", 0.0) for record in done) / 3600
    cost = (
        f"{len(done)} of {len(jobs)} runs of {stage.samples:,} samples done, "
        f"{hours:.2f} hours of one run at a time."
    )
    tables, biases = make_tables(ablation, scores), positional_biases(scores)
    curves = position_figure(ablation, biases)
    named = {ablation.rows[name].title: bias for name, bias in biases.items()}
    # all runs have the same prompts, which `Job.check` makes sure of
    prompts_file = next((job.prompts for job in jobs if job.row in scores), None)
    prompts = prompts_file.read_text(encoding="utf-8").splitlines() if prompts_file is not None else []

    folder.mkdir(parents=True, exist_ok=True)
    # array tasks may write the report at the same time
    write_atomic(folder / "table.md", markdown(tables, named, left_out, cost))
    if curves:
        write_atomic(folder / "positions.svg", curves)
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    text = page.render(
        name=folder.name,
        written=time.strftime("%Y-%m-%d %H:%M"),
        cost=cost,
        tables=tables,
        curves=curves,
        biases=named,
        images=_images(ablation, jobs, scores),
        prompts=prompts[:MAX_IMAGES],
        left_out=left_out,
        stage=dump_stage(stage),
    )
    write_atomic(folder / "report.html", text)

    return folder / "report.html"
