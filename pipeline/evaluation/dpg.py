"""DPG-Bench (Hu et al. 2024, ELLA): yes-no questions to a VQA model about dense prompts, some of which depend on others.

Four pictures of a prompt stand in one file as a 2x2 grid. The published program has quirks that move its numbers; each is a
rule here, kept unless it is set otherwise. Its VQA model is mPLUG-large; any other has to be named with the score.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from pipeline.evaluation.common import Answer, Bench, Judges, BenchImage, Plan, Scores, mean, read_text

CELLS = 4


@dataclass
class DPGRules:
    """Settings of the formula; the defaults are the published program's."""

    skip_first_row: bool = True
    """Leave out the first question of the table. A prompt whose other questions depend on it is dropped with it."""
    drop_failed: bool = True
    """Leave out prompts with a question whose parent is not there; False = a missing parent is no parent."""
    raw_categories: bool = True
    """Scores of categories from the last cell alone, without regard to parents; False = from all cells, gated."""


def plan(prompts: Path, images: int, seed: int) -> Plan:
    """One grid per item of `dpg_bench.csv`; cell j has seed + j. Texts come from `prompts/ITEM.txt` beside it if those are there.

    Raises:
        UserError: the file is missing or not DPG-Bench's, or more cells than a grid has.
    """
    if images > CELLS:
        raise UserError(f"--images {images}: DPG-Bench has grids of at most {CELLS}")
    items: dict[str, dict[str, Any]] = {}
    previous = ""
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(read_text(prompts)))):
            item = row["item_id"]
            if item != previous:
                items[item] = {"text": row["text"], "questions": []}  # a second stretch of rows replaces the first
            previous = item
            question = {
                "row": number,
                "id": int(row["proposition_id"]),
                "parents": [int(parent) for parent in row["dependency"].split(",")],
                "category": row["tuple"].split("(")[0].strip(),
                "question": row["question_natural_language"],
            }
            items[item]["questions"].append(question)
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"--prompts {prompts}: give DPG-Bench's dpg_bench.csv ({type(error).__name__}: {error})") from error
    folder = prompts.parent / "prompts"
    pictures: list[BenchImage] = []
    for item, about in items.items():
        text = read_text(folder / f"{item}.txt").strip() if folder.is_dir() else about["text"]
        seeds = tuple(seed + cell for cell in range(images))
        pictures.append(BenchImage(f"{item}.png", text, seeds, {"questions": about["questions"]}))
    return Plan(pictures)


def cells(image: Image.Image, count: int) -> list[Image.Image]:
    """The grid's cells, row by row."""
    if count == 1:
        return [image]
    width, height = image.width // 2, image.height // 2
    corners = [(0, 0), (width, 0), (0, height), (width, height)][:count]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def ask(judges: Judges, picture: BenchImage, image: Image.Image) -> Answer:
    """Every question, to every cell."""
    questions = [each["question"] for each in picture.about["questions"]]
    return {"cells": [judges.vqa.answers(cell, questions) for cell in cells(image, len(picture.seeds))]}


def gate(right: Mapping[int, float], parents: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """Take away the points of questions one of whose parents has none, in the order of the questions.

    So a chain falls as a whole if parents stand before children, and a child before its parent does not see that the
    parent falls later: the published program works in place.

    Raises:
        KeyError: a parent that is not among the questions.
    """
    gated = dict(right)
    for question, above in parents.items():
        if any(gated[parent] == 0 for parent in above if parent != 0):
            gated[question] = 0.0
    return gated


def score_prompt(
    questions: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], rules: DPGRules
) -> tuple[float, list[tuple[str, float]]] | None:
    """Mean over cells of the share of questions answered `yes` with all their parents, and points by category.

    Args:
        questions: of the prompt.
        answers: per cell, of each question.
        rules: settings of the formula.

    Returns:
        None if the published program fails on this prompt.
    """
    asked = [index for index, each in enumerate(questions) if not (rules.skip_first_row and each["row"] == 0)]
    ids = {questions[index]["id"] for index in asked}
    parents: dict[int, list[int]] = {questions[i]["id"]: list(questions[i]["parents"]) for i in asked}
    if not rules.drop_failed:
        parents = {child: [each for each in above if each in ids] for child, above in parents.items()}
    if not asked:
        return None
    categories = {questions[index]["id"]: questions[index]["category"] for index in asked}
    scores: list[float] = []
    points: list[tuple[str, float]] = []
    for cell in answers:
        right = {questions[index]["id"]: float(cell[index] == "yes") for index in asked}
        try:
            gated = gate(right, parents)
        except KeyError:
            return None
        scores.append(sum(gated.values()) / len(gated))
        if rules.raw_categories:
            points = [(categories[each], value) for each, value in right.items()]
        else:
            points += [(categories[each], value) for each, value in gated.items()]
    return mean(scores), points


def score(pictures: Sequence[BenchImage], answers: Mapping[str, Answer], rules: DPGRules) -> Scores:
    """Overall = mean over prompts x 100; categories at both of DPG-Bench's levels; prompts that were left out, by name."""
    prompts: list[float] = []
    left_out: list[str] = []
    fine: dict[str, list[float]] = {}
    coarse: dict[str, list[float]] = {}
    for picture in pictures:
        scored = score_prompt(picture.about["questions"], answers[picture.file]["cells"], rules)
        if scored is None:
            left_out.append(Path(picture.file).stem)
            continue
        prompts.append(scored[0])
        for category, value in scored[1]:
            fine.setdefault(category, []).append(value)
            coarse.setdefault(category.split("-")[0].strip(), []).append(value)
    if not prompts:
        raise UserError("no prompt is left to score: set drop_failed=false skip_first_row=false")
    return {
        "overall": 100 * mean(prompts),
        "categories": {name: 100 * mean(values) for name, values in sorted(coarse.items())},
        "categories_fine": {name: 100 * mean(values) for name, values in sorted(fine.items())},
        "left_out": left_out,
    }


def needs(pictures: Sequence[BenchImage]) -> set[str]:
    """A VQA model."""
    return {"vqa"}


BENCH = Bench("dpg", CELLS, plan, needs, ask, score, DPGRules, settings={"template": "{question}", "right": "yes"})
