"""DPG-Bench (Hu et al. 2024, ELLA): yes-no questions to a VQA model about dense prompts.

Some questions depend on others. The four images of a prompt are one file, a 2x2 grid. The published program
has quirks that change its numbers; each is a rule here, and is followed unless it is set otherwise. Its VQA
model is mPLUG-large; name any other together with the score.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, BenchImage, Judges, Plan, Scores, mean, read_text

CELLS = 4


@dataclass
class DPGRules:
    """Settings of the formula; the defaults are the published program's."""

    skip_first_row: bool = True
    """Leave out the first question of the table, and with it a prompt whose questions depend on it."""
    drop_failed: bool = True
    """Leave out prompts with a question whose parent is missing; False = ignore a missing parent."""
    raw_categories: bool = True
    """Scores of categories from the last cell only, regardless of parents; False = from all cells, gated."""


def plan(prompts: Path, images_per_prompt: int, seed: int) -> Plan:
    """Plan one grid per item of `dpg_bench.csv`; cell j has seed + j.

    The texts come from `prompts/ITEM.txt` next to the table, if that folder exists.

    Raises:
        UserError: if the file is missing or not DPG-Bench's, or a grid has too few cells.
    """
    if images_per_prompt > CELLS:
        raise UserError(f"--images {images_per_prompt}: DPG-Bench has grids of at most {CELLS}")
    items: dict[str, dict[str, Any]] = {}
    previous = ""
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(prompts)))):
            item = row["item_id"]
            if item != previous:
                # as published: a second run of rows of an item replaces the first
                items[item] = {"text": row["text"], "questions": []}
            previous = item
            question = {
                "row": number,
                # ids are unique within an item only; `row` counts through the table, for `skip_first_row`
                "id": int(row["proposition_id"]),
                "parents": [int(parent) for parent in row["dependency"].split(",")],
                # a tuple is like `attribute - color (apple, red)`
                "category": row["tuple"].split("(")[0].strip(),
                "question": row["question_natural_language"],
            }
            items[item]["questions"].append(question)
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"--prompts {prompts}: give DPG-Bench's dpg_bench.csv ({type(error).__name__}: {error})"
        ) from error

    folder = prompts.parent / "prompts"
    seeds = tuple(seed + cell for cell in range(images_per_prompt))
    images: list[BenchImage] = []
    for item, about in items.items():
        text = read_text(folder / f"{item}.txt").strip() if folder.is_dir() else about["text"]
        images.append(BenchImage(f"{item}.png", text, seeds, {"questions": about["questions"]}))

    return Plan(images)


def cells(image: Image.Image, count: int) -> list[Image.Image]:
    """Return the grid's cells, row by row."""
    if count == 1:
        return [image]
    # `pipeline.evaluate` always writes a 2x2 grid, also of two or three cells
    width, height = image.width // 2, image.height // 2
    corners = [(0, 0), (width, 0), (0, height), (width, height)][:count]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def ask(judges: Judges, entry: BenchImage, image: Image.Image) -> Answer:
    """Ask every question about every cell."""
    questions = [question["question"] for question in entry.about["questions"]]
    return {"cells": [judges.vqa.answers(cell, questions) for cell in cells(image, len(entry.seeds))]}


def gate(right: Mapping[int, float], parents: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """Remove the points of each question that has a parent without points, in the order of the questions.

    A chain is therefore removed as a whole only if parents come before children: a child that comes before
    its parent does not see that the parent loses its points later. The published program works in place like
    this.

    Args:
        right: points by question.
        parents: parents by question; 0 = none.

    Raises:
        KeyError: if a parent is not among the questions.
    """
    # read and written in place, as published
    gated = dict(right)
    for question, its_parents in parents.items():
        if any(gated[parent] == 0 for parent in its_parents if parent != 0):
            gated[question] = 0.0
    return gated


def score_prompt(
    questions: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], rules: DPGRules
) -> tuple[float, list[tuple[str, float]]] | None:
    """Score one prompt.

    Args:
        questions: questions of the prompt.
        answers: answers to each question, per cell.
        rules: settings of the formula.

    Returns:
        The mean over cells of the share of questions that are answered `yes` with all their parents, and the
        points by category. None if the published program fails on this prompt.
    """
    asked = [i for i, question in enumerate(questions) if not (rules.skip_first_row and question["row"] == 0)]
    if not asked:
        return None

    ids = {questions[i]["id"] for i in asked}
    parents: dict[int, list[int]] = {questions[i]["id"]: list(questions[i]["parents"]) for i in asked}
    # a parent that is not asked fails the prompt in the published program
    if not rules.drop_failed:
        for child, its_parents in parents.items():
            parents[child] = [parent for parent in its_parents if parent in ids]

    categories = {questions[i]["id"]: questions[i]["category"] for i in asked}
    scores: list[float] = []
    points: list[tuple[str, float]] = []
    for cell in answers:
        # the whole answer has to be `yes`: `yes, it is` counts as wrong, as published
        right = {questions[i]["id"]: float(cell[i] == "yes") for i in asked}
        try:
            gated = gate(right, parents)
        except KeyError:
            return None
        scores.append(sum(gated.values()) / len(gated))

        # as published: each cell overwrites the points of the cell before
        if rules.raw_categories:
            points = [(categories[question], value) for question, value in right.items()]
        else:
            points += [(categories[question], value) for question, value in gated.items()]

    return mean(scores), points


def score(images: Sequence[BenchImage], answers: Mapping[str, Answer], rules: DPGRules) -> Scores:
    """Return 100 x the mean over prompts, by category at both levels, and the prompts left out."""
    prompts: list[float] = []
    left_out: list[str] = []
    fine: dict[str, list[float]] = {}
    coarse: dict[str, list[float]] = {}
    for image in images:
        scored = score_prompt(image.about["questions"], answers[image.file]["cells"], rules)
        if scored is None:
            left_out.append(Path(image.file).stem)
            continue
        value, points = scored
        prompts.append(value)
        for category, point in points:
            fine.setdefault(category, []).append(point)
            # `attribute - color` counts for `attribute`
            coarse.setdefault(category.split("-")[0].strip(), []).append(point)

    if not prompts:
        raise UserError("no prompt is left to score: set drop_failed=false skip_first_row=false")

    return {
        "overall": 100 * mean(prompts),
        "categories": {name: 100 * mean(values) for name, values in sorted(coarse.items())},
        "categories_fine": {name: 100 * mean(values) for name, values in sorted(fine.items())},
        "left_out": left_out,
    }


def needs(images: Sequence[BenchImage]) -> set[str]:
    """A VQA model."""
    return {"vqa"}


SETTINGS = {"template": "{question}", "right": "yes"}
BENCH = Bench("dpg", CELLS, plan, needs, ask, score, DPGRules, settings=SETTINGS)
