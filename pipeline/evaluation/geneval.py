"""GenEval (Ghosh et al. 2023): objects, their number, color and position, by a detector and CLIP.

Formula and thresholds are those of its public evaluation. The overall score is the unweighted mean over the
tags of the share of correct images, not the share of correct images itself; both are reported.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from model.scorers.detectors import Detection
from pipeline.evaluation.common import Answer, Bench, BenchImage, Judges, Plan, Scores, iou, mean, read_text

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"
"""Color around an object whose mask is known, when CLIP is asked for the object's color."""
FLOOR = 0.1
"""Objects with a lower confidence are not stored in the answers, so thresholds can be set from here on."""
COCO_NAMES = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}
"""GenEval's name -> the detector's."""

Object = Mapping[str, Any]
"""A detected object as the answers store it: `class`, `score`, `box`, and `color` where it was asked for."""


@dataclass
class GenEvalRules:
    """Settings of the formula, as published."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    """Confidence above which an object counts if the tag is `counting`."""
    max_objects: int = 16
    """Maximum number of objects per class, by confidence."""
    max_overlap: float = 1.0
    """IoU above which the weaker of two objects of a class is dropped; 1 = never."""
    position_threshold: float = 0.1
    """Share of the two objects' summed sizes that an offset has to exceed."""

    def __post_init__(self) -> None:
        if min(self.threshold, self.counting_threshold) < FLOOR:
            raise ValueError(f"thresholds below {FLOOR} need other answers: objects below it are not stored")


def plan(prompts: Path, images_per_prompt: int, seed: int) -> Plan:
    """Plan the images of `evaluation_metadata.jsonl`; image j of each prompt has seed + j.

    Raises:
        UserError: if the file is missing or a line is not GenEval's.
    """
    images: list[BenchImage] = []
    files: dict[str, str] = {}
    lines = [line for line in read_text(prompts).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        try:
            about = json.loads(line)
            prompt = about["prompt"]
            _check(about)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"not GenEval's evaluation_metadata.jsonl ({type(error).__name__}: {error})"
            raise UserError(f"--prompts {prompts}, line {number + 1}: {reason}") from error

        # GenEval's own program finds the prompt's metadata next to its samples
        files[f"{number:05d}/metadata.jsonl"] = json.dumps(about)
        for j in range(images_per_prompt):
            images.append(BenchImage(f"{number:05d}/samples/{j:05d}.png", prompt, (seed + j,), about))

    return Plan(images, files)


def _check(about: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError if this is not GenEval's metadata."""
    str(about["tag"])
    for number, clause in enumerate([*about.get("include", []), *about.get("exclude", [])]):
        if not isinstance(clause["class"], str) or not isinstance(clause["count"], int):
            raise TypeError("class and count of a clause")
        if "color" in clause and clause["color"] not in COLORS:
            raise ValueError(f"color {clause['color']}")
        if "position" in clause and not 0 <= clause["position"][1] < number:
            raise ValueError("position of a later object")


def ask(judges: Judges, entry: BenchImage, image: Image.Image) -> Answer:
    """Return the objects of the prompt's classes, with colors where the prompt asks for them."""
    clauses = [*entry.about.get("include", []), *entry.about.get("exclude", [])]
    # a class may be in several clauses, and is detected once
    names: list[str] = list(dict.fromkeys(clause["class"] for clause in clauses))

    # a detector with fixed classes knows some of them under other names
    closed = judges.detector.identity.get("kind") == "mask2former"
    names_of_labels: dict[str, str] = {COCO_NAMES.get(name, name) if closed else name: name for name in names}
    detections: dict[str, list[Detection]] = {name: [] for name in names}
    for detection in judges.detector.detect(image, list(names_of_labels), FLOOR):
        detections[names_of_labels[detection.label]].append(detection)

    colored = {clause["class"] for clause in entry.about.get("include", []) if "color" in clause}
    objects: list[dict[str, Any]] = []
    for name, group in detections.items():
        records = [{"class": name, "score": found.score, "box": list(found.box)} for found in group]
        # CLIP runs only where a color is asked for
        if name in colored:
            for record, color in zip(records, _colors(judges, name, group, image), strict=True):
                record["color"] = color
        objects += records

    return {"objects": objects}


def _colors(judges: Judges, name: str, detections: Sequence[Detection], image: Image.Image) -> list[str]:
    """Return the color that CLIP sees in each detected object."""
    classes: list[list[str]] = []
    for color in COLORS:
        classes.append([template.format(color=color, name=name) for template in COLOR_TEMPLATES])
    crops = [_crop(image, detection) for detection in detections]
    return [COLORS[index] for index in judges.clip.classify(crops, classes)]


def _crop(image: Image.Image, detection: Detection) -> Image.Image:
    if detection.mask is not None:
        background = Image.new("RGB", image.size, BACKGROUND)
        # gray around the object, so that CLIP does not see the background's color
        image = Image.composite(image, background, Image.fromarray(detection.mask))
    # a box may be thinner than a pixel, and an empty crop is an error
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def is_correct(
    about: Mapping[str, Any], objects: Sequence[Object], rules: GenEvalRules
) -> tuple[bool, list[str]]:
    """Judge one image: all `include` clauses have to hold, and no `exclude` clause may be reached.

    Colors and positions are checked for the most confident objects only, as many as the clause asks for.

    Args:
        about: GenEval's metadata of the prompt.
        objects: detected objects.
        rules: settings of the formula.

    Returns:
        True if the image is correct, and the list of what is wrong.
    """
    by_class = _select(objects, about["tag"], rules)
    wrong: list[str] = []

    groups: list[list[Object] | None] = []
    for clause in about.get("include", []):
        # the most confident ones; more objects than asked for are judged by `exclude` alone
        group = by_class.get(clause["class"], [])[: clause["count"]]
        problem = _problem(clause, group, groups, rules)
        # a later clause may refer to the position of this one, unless this one failed
        groups.append(None if problem else group)
        if problem:
            wrong.append(problem)

    for clause in about.get("exclude", []):
        count = len(by_class.get(clause["class"], []))
        # for `counting`, GenEval excludes one object more than it includes
        if count >= clause["count"]:
            wrong.append(f"{clause['class']}: {count}, less than {clause['count']} wanted")

    return not wrong, wrong


def _problem(
    clause: Mapping[str, Any],
    group: Sequence[Object],
    groups: Sequence[Sequence[Object] | None],
    rules: GenEvalRules,
) -> str:
    """Return the first thing that is wrong with the objects of an `include` clause, or an empty string."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"{name}: {len(group)} of {count}"

    if "color" in clause:
        right = sum(found.get("color") == clause["color"] for found in group)
        if right < count:
            return f"{name}: {right} of {count} {clause['color']}"

    if "position" in clause:
        relation, target = clause["position"]
        others = groups[target]
        if others is None:
            return f"{name}: nothing to be {relation}"
        # as published, every pair of the two groups has to be in the relation
        for found in group:
            for other in others:
                if relation not in positions(found["box"], other["box"], rules.position_threshold):
                    return f"{name}: not {relation}"

    return ""


def _select(objects: Sequence[Object], tag: str, rules: GenEvalRules) -> dict[str, list[Object]]:
    """Return the objects that count by class, the most confident first."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    classes: dict[str, list[Object]] = {}
    for found in sorted(objects, key=lambda found: -found["score"]):
        if found["score"] > threshold:
            classes.setdefault(found["class"], []).append(found)

    for name, group in classes.items():
        selected: list[Object] = []
        # as published, the limit is applied before overlaps are dropped
        for found in group[: rules.max_objects]:
            overlaps = [iou(found["box"], other["box"], pixel=1) for other in selected]
            if rules.max_overlap == 1 or all(overlap < rules.max_overlap for overlap in overlaps):
                selected.append(found)
        classes[name] = selected

    return classes


def positions(a: Sequence[float], b: Sequence[float], threshold: float) -> set[str]:
    """Return the relations of box a to box b; a diagonal can be two relations.

    The offset of the centers is shortened by `threshold` times the summed sizes, and then divided by its
    length before that.
    """
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    revised = [
        math.copysign(max(abs(value) - threshold * size, 0.0), value)
        for value, size in zip(offset, sizes, strict=True)
    ]
    # an offset within the threshold is no relation
    if all(abs(value) < 1e-3 for value in revised):
        return set()

    # image coordinates: y grows downward, so a negative y is above
    x, y = (value / math.hypot(*offset) for value in revised)
    relations = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}

    return {relation for relation, holds in relations.items() if holds}


def score(images: Sequence[BenchImage], answers: Mapping[str, Answer], rules: GenEvalRules) -> Scores:
    """Return the mean over tags, and the shares of correct images and of prompts with a correct image."""
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for image in images:
        right, _ = is_correct(image.about, answers[image.file]["objects"], rules)
        tags.setdefault(image.about["tag"], []).append(right)
        # the images of a prompt share its metadata
        key = json.dumps(image.about, sort_keys=True)
        prompts[key] = prompts.get(key, False) or right

    by_tag = {tag: mean(results) for tag, results in tags.items()}

    return {
        "overall": mean(list(by_tag.values())),
        "tags": by_tag,
        "images": mean(list(chain.from_iterable(tags.values()))),
        "prompts_any_image": mean(list(prompts.values())),
    }


def needs(images: Sequence[BenchImage]) -> set[str]:
    """The detector, and CLIP if a color is asked for."""
    clauses = chain.from_iterable(image.about.get("include", []) for image in images)
    colored = any("color" in clause for clause in clauses)
    return {"detector", "clip"} if colored else {"detector"}


SETTINGS = {"kept_above": FLOOR, "color_templates": list(COLOR_TEMPLATES), "background": BACKGROUND}
BENCH = Bench("geneval", 4, plan, needs, ask, score, GenEvalRules, settings=SETTINGS)
