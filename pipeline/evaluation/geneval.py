"""GenEval (Ghosh et al. 2023): are the right objects there, in number, colour and place, by a detector and CLIP?

Formula and thresholds as its public evaluation has them. An overall score is the unweighted mean over the tags of the share of
right pictures, not the share of right pictures itself; both are given.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from model.scorers.detectors import Found
from pipeline.evaluation.common import Answer, Bench, Judges, BenchImage, Plan, Scores, mean, read_text

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"
"""Around an object, where its mask is known, when its colour is asked for."""
FLOOR = 0.1
"""Objects below this confidence are not kept in the answers; thresholds may be set from here on."""
COCO_NAMES = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}
"""GenEval's name -> the detector's."""


@dataclass
class GenEvalRules:
    """Settings of the formula, as published."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    """Confidence from which an object counts where the tag is `counting`."""
    max_objects: int = 16
    """Of a class, the surest ones that are looked at."""
    max_overlap: float = 1.0
    """IoU from which the weaker of two objects of a class is dropped; 1 = none is."""
    position_threshold: float = 0.1
    """Share of the two objects' summed sizes that an offset has to exceed."""

    def __post_init__(self) -> None:
        if min(self.threshold, self.counting_threshold) < FLOOR:
            raise ValueError(f"thresholds below {FLOOR} need other answers: objects below it are not kept")


def plan(prompts: Path, images: int, seed: int) -> Plan:
    """Pictures of `evaluation_metadata.jsonl`; image j of each prompt has seed + j.

    Raises:
        UserError: the file is missing or a line is not GenEval's.
    """
    pictures: list[BenchImage] = []
    files: dict[str, str] = {}
    lines = [line for line in read_text(prompts).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        try:
            about = json.loads(line)
            prompt = about["prompt"]
            _check(about)
        except (ValueError, KeyError, TypeError) as error:
            where = f"--prompts {prompts}, line {number + 1}"
            raise UserError(f"{where}: not GenEval's evaluation_metadata.jsonl ({type(error).__name__}: {error})") from error
        files[f"{number:05d}/metadata.jsonl"] = json.dumps(about)
        pictures += [BenchImage(f"{number:05d}/samples/{j:05d}.png", prompt, (seed + j,), about) for j in range(images)]
    return Plan(pictures, files)


def _check(about: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for what is no metadata of GenEval."""
    str(about["tag"])
    for number, clause in enumerate([*about.get("include", []), *about.get("exclude", [])]):
        if not isinstance(clause["class"], str) or not isinstance(clause["count"], int):
            raise TypeError("class and count of a clause")
        if "color" in clause and clause["color"] not in COLORS:
            raise ValueError(f"color {clause['color']}")
        if "position" in clause and not 0 <= clause["position"][1] < number:
            raise ValueError("position of a later object")


def ask(judges: Judges, picture: BenchImage, image: Image.Image) -> Answer:
    """Objects of the classes that are asked for, and the colours of those whose colour is."""
    clauses = [*picture.about.get("include", []), *picture.about.get("exclude", [])]
    names: list[str] = list(dict.fromkeys(clause["class"] for clause in clauses))
    closed = judges.detector.identity.get("kind") == "mask2former"
    known: dict[str, str] = {COCO_NAMES.get(name, name) if closed else name: name for name in names}
    objects: list[dict[str, Any]] = []
    kept: dict[str, list[Found]] = {name: [] for name in names}
    for found in judges.detector.detect(image, list(known), FLOOR):
        kept[known[found.label]].append(found)
    coloured = {clause["class"] for clause in picture.about.get("include", []) if "color" in clause}
    for name, group in kept.items():
        records = [{"class": name, "score": each.score, "box": list(each.box)} for each in group]
        if name in coloured:
            classes = [[template.format(color=color, name=name) for template in COLOR_TEMPLATES] for color in COLORS]
            seen = judges.clip.classify([_crop(image, each) for each in group], classes)
            for record, color in zip(records, seen, strict=True):
                record["color"] = COLORS[color]
        objects += records
    return {"objects": objects}


def _crop(image: Image.Image, found: Found) -> Image.Image:
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = (round(side) for side in found.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def is_correct(about: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], rules: GenEvalRules) -> tuple[bool, list[str]]:
    """Whether all `include` clauses hold and no `exclude` clause is reached, and what is wrong.

    Colours and places are looked at for the surest objects alone, as many as are asked for.
    """
    found = _select(objects, about["tag"], rules)
    wrong: list[str] = []
    groups: list[list[Mapping[str, Any]] | None] = []
    for clause in about.get("include", []):
        name, count = clause["class"], clause["count"]
        group = found.get(name, [])[:count]
        problem = "" if len(group) >= count else f"{name}: {len(group)} of {count}"
        if not problem and "color" in clause:
            right = sum(each.get("color") == clause["color"] for each in group)
            problem = "" if right >= count else f"{name}: {right} of {count} {clause['color']}"
        if not problem and "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            if others is None:
                problem = f"{name}: nothing to be {relation}"
            elif any(relation not in positions(a["box"], b["box"], rules.position_threshold) for a in group for b in others):
                problem = f"{name}: not {relation}"
        groups.append(None if problem else group)
        wrong += [problem] if problem else []
    for clause in about.get("exclude", []):
        seen = len(found.get(clause["class"], []))
        if seen >= clause["count"]:
            wrong.append(f"{clause['class']}: {seen}, less than {clause['count']} wanted")
    return not wrong, wrong


def _select(objects: Sequence[Mapping[str, Any]], tag: str, rules: GenEvalRules) -> dict[str, list[Mapping[str, Any]]]:
    """The objects that count by class, the surest first."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    classes: dict[str, list[Mapping[str, Any]]] = {}
    for each in sorted(objects, key=lambda each: -each["score"]):
        if each["score"] > threshold:
            classes.setdefault(each["class"], []).append(each)
    for name, group in classes.items():
        kept: list[Mapping[str, Any]] = []
        for each in group[: rules.max_objects]:
            if rules.max_overlap == 1 or all(iou(each["box"], other["box"]) < rules.max_overlap for other in kept):
                kept.append(each)
        classes[name] = kept
    return classes


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes whose last pixels belong to them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def positions(a: Sequence[float], b: Sequence[float], threshold: float) -> set[str]:
    """How box a lies to box b; a diagonal can be two relations.

    The offset of the centres is shortened by `threshold` times the summed sizes and divided by its own length before that.
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    revised = [math.copysign(max(abs(each) - threshold * size, 0.0), each) for each, size in zip(offset, sizes, strict=True)]
    if all(abs(each) < 1e-3 for each in revised):
        return set()
    x, y = (each / math.hypot(*offset) for each in revised)
    relations = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in relations.items() if holds}


def score(pictures: Sequence[BenchImage], answers: Mapping[str, Answer], rules: GenEvalRules) -> Scores:
    """Overall = mean over tags; besides, the shares of right pictures and of prompts with at least one right picture."""
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for picture in pictures:
        right = is_correct(picture.about, answers[picture.file]["objects"], rules)[0]
        tags.setdefault(picture.about["tag"], []).append(right)
        key = json.dumps(picture.about, sort_keys=True)
        prompts[key] = prompts.get(key, False) or right
    by_tag = {tag: mean(each) for tag, each in tags.items()}
    images = [right for each in tags.values() for right in each]
    return {
        "overall": mean(list(by_tag.values())),
        "tags": by_tag,
        "images": mean(images),
        "prompts_any_image": mean(list(prompts.values())),
    }


def needs(pictures: Sequence[BenchImage]) -> set[str]:
    """The detector, and CLIP where a colour is asked for."""
    coloured = any("color" in clause for picture in pictures for clause in picture.about.get("include", []))
    return {"detector", "clip"} if coloured else {"detector"}


BENCH = Bench(
    "geneval", 4, plan, needs, ask, score, GenEvalRules,
    settings={"kept_above": FLOOR, "color_templates": list(COLOR_TEMPLATES), "background": BACKGROUND},
)  # fmt: skip
