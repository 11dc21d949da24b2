"""Objects of T2I-CompBench's prompts and images: which are asked for, their positions, their number."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from model.common.errors import UserError
from model.scorers.noun_phrases import Parsed
from pipeline.evaluation.common import iou, read_text

FLOOR = 0.1
"""Objects with a lower confidence are not stored in the answers."""
NEAR = ("next to", "on side of", "near")
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
"""Spatial relations; the first one that the prompt contains applies."""
PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
"""Prepositions of complex prompts, whose objects are the nouns around the preposition."""
MAX_OVERLAP = 0.1
"""IoU of two objects from which the score of their position decreases."""
SAME_OBJECT = 0.9
"""Two boxes of a class are one object if they share more than this part of either box."""
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
ARTICLES = ("a", "an")
DETECTOR_NAMES = {
    **dict.fromkeys(("boy", "girl", "man", "woman"), "person"),
    "ship": "boat",
    "telivision": "tv",
    "goldfish": "fish",
    "painting": "picture",
}
"""The prompt's noun -> the detector's class."""

Corners = tuple[float, ...]
"""Left, top, right, bottom."""
Names = list[list[str]]
"""[singular, plural] of each object."""


@dataclass(frozen=True)
class Box:
    """A detected object."""

    name: str
    score: float
    box: Corners


def detector_name(noun: str) -> str:
    """Return the detector's class for a noun of the prompt."""
    return DETECTOR_NAMES.get(noun, noun)


def detector_scale(width: int, height: int) -> float:
    """Return the factor from the image's pixels to UniDet's: shorter side 479, no side longer than 480."""
    return min(479 / min(width, height), 480 / max(width, height))


def find_relation(prompt: str, on_top_of: bool) -> str | None:
    """Return the spatial relation in a prompt, or None.

    "on top of" counts as none, unless `on_top_of` says to read it as "on the top of".
    """
    relation = next((relation for relation in RELATIONS if relation in prompt), None)
    if relation == "on top of":
        return "on the top of" if on_top_of else None
    return relation


def first_and_last_noun(parsed: Parsed) -> list[str]:
    """Return the two objects of a simple prompt, or an empty list if it has no noun."""
    nouns = [text for text, part in parsed.words if part == "NOUN"]
    return [nouns[0], nouns[-1]] if nouns else []


def nouns_around_preposition(parsed: Parsed) -> list[str]:
    """Return the objects of a complex prompt: the noun before and the noun after each preposition.

    The list is empty unless there are exactly two.
    """
    words = parsed.words
    texts = [text for text, _ in words]
    objects: list[str] = []
    for i in range(len(words)):
        # the longest preposition that starts here
        length = next((n for n in (3, 2, 1) if " ".join(texts[i : i + n]) in PREPOSITIONS), 0)
        if not length:
            continue
        # the nearest noun before, and at most one, since the words are reversed
        objects += [text for text, part in reversed(words[:i]) if part in ("NOUN", "PROPN")][:1]
        behind = words[i + length :]
        nouns = [text for text, part in behind if part == "NOUN"][:1]
        objects += nouns or _last_of_first_name(behind)

    return objects if len(objects) == 2 else []


def _last_of_first_name(words: Sequence[tuple[str, str]]) -> list[str]:
    """Return the end of the first run of proper nouns; as published, never the last word."""
    for (word, part), (_, next_part) in pairwise(words):
        if part == "PROPN" and next_part != "PROPN":
            return [word]
    return []


def read_names(path: Path) -> Names:
    """Read T2I-CompBench's `new_objects.txt`, with one `singular - plural` per line.

    Raises:
        UserError: if the file is missing or has another form.
    """
    names: Names = []
    for line in read_text(path).splitlines():
        if line.strip():
            names.append([part.strip().lower() for part in line.split(" - ")])

    if not names or any(len(pair) < 2 for pair in names):
        raise UserError(
            f"{path}: give T2I-CompBench's new_objects.txt, with one `singular - plural` per line"
        )

    return [pair[:2] for pair in names]


def count_objects(parsed: Parsed, names: Names) -> tuple[list[str], list[int]]:
    """Return the objects of a numeracy prompt, in the singular, and the number of each.

    As published, an article before a plural gives an object without a number, so later numbers belong to the
    object before.
    """
    singulars, plurals = [pair[0] for pair in names], [pair[1] for pair in names]
    texts = [text for text, _ in parsed.words]
    objects: list[str] = []
    numbers: list[int] = []
    for i, word in enumerate(texts):
        if word not in NUMBERS and word not in ARTICLES:
            continue
        next_two, next_word = " ".join(texts[i + 1 : i + 3]), " ".join(texts[i + 1 : i + 2])
        # as published, `one` counts like an article
        single = word in (*ARTICLES, "one")
        if i < len(texts) - 2 and (next_two in singulars or next_two in plurals):
            plural = next_two in plurals and not single
            objects.append(singulars[plurals.index(next_two)] if plural else next_two)
            numbers.append(NUMBERS[word] if plural else 1)
        elif next_word in singulars and single:
            objects.append(next_word)
            numbers.append(1)
        elif next_word in plurals:
            objects.append(singulars[plurals.index(next_word)])
            numbers += [NUMBERS[word]] if word in NUMBERS else []

    return objects, numbers


def score_position(relation: str | None, a: Corners, b: Corners, scale: float, near: float) -> float:
    """Score the position of box a relative to box b, in [0, 1].

    The score is 1 if the relation holds; less the further apart ("near") or the more they overlap (sides).

    Args:
        relation: one of `RELATIONS`, or None.
        a: box of the first object.
        b: box of the second object.
        scale: factor to the detector's pixels.
        near: distance that counts as near, in the detector's pixels.
    """
    # the offset between the centers of the boxes
    x, y = ((b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 * scale for i in (0, 1))
    if relation in NEAR:
        return 1.0 if abs(x) < near or abs(y) < near else near / max(abs(x), abs(y))

    # relation -> the offset along its direction, and across it
    sides = {
        "on the right of": (-x, y),
        "on the left of": (x, y),
        "on the bottom of": (-y, x),
        "on the top of": (y, x),
    }
    if relation not in sides:
        return 0.0
    along, across = sides[relation]
    # the wrong side, or more to another side than to this one
    if along <= 0 or along <= abs(across):
        return 0.0
    overlap = iou(a, b)

    return 1.0 if overlap < MAX_OVERLAP else MAX_OVERLAP / overlap


def _is_same_object(a: Corners, b: Corners) -> bool:
    """True if two boxes of a class are one object. Boxes include the pixels at their right and bottom."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return any(width * height / area > SAME_OBJECT for area in areas)


def score_counts(objects: Sequence[str], numbers: Sequence[int], boxes: Sequence[Box]) -> float:
    """Score the numbers of objects: half for being detected, half for the exact number of boxes.

    Boxes of a class that contain each other count once. An object that is not itself a class takes every
    class whose name contains its name.

    Args:
        objects: objects of the prompt.
        numbers: their numbers.
        boxes: detected objects.
    """
    distinct: list[Box] = []
    for box in boxes:
        if not any(other.name == box.name and _is_same_object(box.box, other.box) for other in distinct):
            distinct.append(box)

    names = [box.name for box in distinct]
    total = 0.0
    for index, wanted in enumerate(objects):
        # as published, and in place: it also affects the objects after this one
        if wanted not in names:
            names = [wanted if wanted in name else name for name in names]
        if wanted in names:
            total += 0.5
            total += 0.5 * (index < len(numbers) and names.count(wanted) == numbers[index])

    return total / len(objects) if objects else 0.0
