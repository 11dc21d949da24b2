"""Objects of T2I-CompBench's prompts and pictures: which are asked for, how they lie, how many there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.common.errors import UserError
from model.scorers.noun_phrases import Parsed
from pipeline.evaluation.common import read_text

FLOOR = 0.1
"""Objects below this confidence are not kept in the answers."""
NEAR = ("next to", "on side of", "near")
RELATIONS = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of", "on top of",
)  # fmt: skip
"""The first that stands in the prompt holds."""
PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
"""Of complex prompts: the objects are the nouns around the preposition."""
OVERLAP = 0.1
SAME = 0.9
"""Share of a box that lies in another of its class from which they are one object."""
NUMBERS = {word: n for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), start=1)}
ARTICLES = ("a", "an")
DETECTOR_NAMES = {
    **dict.fromkeys(("boy", "girl", "man", "woman"), "person"),
    "ship": "boat", "telivision": "tv", "goldfish": "fish", "painting": "picture",
}  # fmt: skip
"""The prompt's noun -> the detector's class."""

Corners = tuple[float, ...]
"""Left, top, right, bottom."""
Names = list[list[str]]
"""[singular, plural] of each object."""


@dataclass(frozen=True)
class Box:
    """An object that was found."""

    name: str
    score: float
    box: Corners


def detector_name(noun: str) -> str:
    """The detector's class for a noun of the prompt."""
    return DETECTOR_NAMES.get(noun, noun)


def detector_scale(width: int, height: int) -> float:
    """From the picture's pixels to UniDet's: the shorter side 479, but none longer than 480."""
    return min(479 / min(width, height), 480 / max(width, height))


def find_relation(prompt: str, on_top_of: bool) -> str | None:
    """The spatial relation that a prompt asks for; "on top of" is none unless it is to be read as "on the top of"."""
    relation = next((each for each in RELATIONS if each in prompt), None)
    return ("on the top of" if on_top_of else None) if relation == "on top of" else relation


def first_and_last_noun(parsed: Parsed) -> list[str]:
    """The two objects of a simple prompt; none if it has no noun."""
    nouns = [text for text, part in parsed.words if part == "NOUN"]
    return [nouns[0], nouns[-1]] if nouns else []


def nouns_around_preposition(parsed: Parsed) -> list[str]:
    """The objects of a complex prompt: the noun before and the noun after each preposition; none unless they are two."""
    words = parsed.words
    texts = [text for text, _ in words]
    objects: list[str] = []
    for i in range(len(words)):
        length = next((n for n in (3, 2, 1) if " ".join(texts[i : i + n]) in PREPOSITIONS), 0)
        if not length:
            continue
        objects += [text for text, part in reversed(words[:i]) if part in ("NOUN", "PROPN")][:1]
        behind = words[i + length :]
        after = [text for text, part in behind if part == "NOUN"][:1]
        objects += after or _last_of_first_name(behind)
    return objects if len(objects) == 2 else []


def _last_of_first_name(words: Sequence[tuple[str, str]]) -> list[str]:
    """The first proper noun that no proper noun follows directly; the last word is not one."""
    return [words[j][0] for j in range(len(words) - 1) if words[j][1] == "PROPN" and words[j + 1][1] != "PROPN"][:1]


def read_names(path: Path) -> Names:
    """T2I-CompBench's `new_objects.txt`: `singular - plural` a line.

    Raises:
        UserError: it is missing or of another form.
    """
    names = [[part.strip().lower() for part in line.split(" - ")] for line in read_text(path).splitlines() if line.strip()]
    if not names or any(len(pair) < 2 for pair in names):
        raise UserError(f"{path}: give T2I-CompBench's new_objects.txt, `singular - plural` a line")
    return [pair[:2] for pair in names]


def count_objects(parsed: Parsed, names: Names) -> tuple[list[str], list[int]]:
    """Objects that a numeracy prompt asks for, in the singular, and how many of each.

    An article before a plural gives an object without a number, so that later numbers belong to the object before: as published.
    """
    singulars, plurals = ([pair[i] for pair in names] for i in (0, 1))
    texts = [text for text, _ in parsed.words]
    objects: list[str] = []
    numbers: list[int] = []
    for i, word in enumerate(texts):
        if word not in NUMBERS and word not in ARTICLES:
            continue
        two, one = " ".join(texts[i + 1 : i + 3]), " ".join(texts[i + 1 : i + 2])
        single = word in (*ARTICLES, "one")
        if i < len(texts) - 2 and (two in singulars or two in plurals):
            plural = two in plurals and not single
            objects.append(singulars[plurals.index(two)] if plural else two)
            numbers.append(NUMBERS[word] if plural else 1)
        elif one in singulars and single:
            objects.append(one)
            numbers.append(1)
        elif one in plurals:
            objects.append(singulars[plurals.index(one)])
            numbers += [NUMBERS[word]] if word in NUMBERS else []
    return objects, numbers


def place(relation: str | None, a: Corners, b: Corners, scale: float, near: float) -> float:
    """How well box a stands to box b, in [0, 1]: 1, or less the further apart ("near") or the more they overlap (sides).

    Args:
        relation: of `RELATIONS`, or none.
        a: the object that stands somewhere.
        b: what it stands to.
        scale: to the detector's pixels.
        near: distance in them.
    """
    x, y = ((b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 * scale for i in (0, 1))
    if relation in NEAR:
        return 1.0 if abs(x) < near or abs(y) < near else near / max(abs(x), abs(y))
    sides = {"on the right of": (-x, y), "on the left of": (x, y), "on the bottom of": (-y, x), "on the top of": (y, x)}
    if relation not in sides:
        return 0.0
    along, across = sides[relation]
    if along <= 0 or along <= abs(across):
        return 0.0
    overlap = iou(a, b)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union; 0 of two boxes without area."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def _one_object(a: Corners, b: Corners) -> bool:
    """Whether two boxes of a class are one object; their last pixels belong to them."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    return any(width * height / ((box[2] - box[0] + 1) * (box[3] - box[1] + 1)) > SAME for box in (a, b))


def score_counts(objects: Sequence[str], numbers: Sequence[int], found: Sequence[Box]) -> float:
    """Numeracy: each object weighs the same, half for being there, half for the exact number of boxes.

    Boxes of a class that lie in one another count once. An object that is no class itself takes every class whose name
    holds its name.
    """
    kept: list[Box] = []
    for box in found:
        if not any(other.name == box.name and _one_object(box.box, other.box) for other in kept):
            kept.append(box)
    names = [box.name for box in kept]
    total = 0.0
    for index, wanted in enumerate(objects):
        if wanted not in names:
            names = [wanted if wanted in name else name for name in names]
        if wanted in names:
            total += 0.5
            total += 0.5 * (index < len(numbers) and names.count(wanted) == numbers[index])
    return total / len(objects) if objects else 0.0
