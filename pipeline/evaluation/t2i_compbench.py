"""T2I-CompBench (Huang et al. 2023): attributes by BLIP-VQA, places and numbers by a detector, actions by CLIP.

Formulas as its public programs have them, quirks included; those that one may want otherwise are rules. Its detector is UniDet;
any other has to be named with the score. 3-D places are not scored here. "T2I-avg" in LI-DiT's tables is the mean of color, shape
and texture.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from model.common.errors import UserError
from model.scorers.noun_phrases import Parsed
from pipeline.evaluation import t2i_objects
from pipeline.evaluation.common import Answer, Bench, Judges, BenchImage, Plan, Scores, mean, read_text
from pipeline.evaluation.t2i_objects import FLOOR, Box

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "numeracy", "non_spatial", "complex")
CHUNKS = 8
BLIP_SIDE = 480
"""BLIP sees pictures of this size here."""
MAX_NAME_LENGTH = 255
"""Bytes of a file's name."""


@dataclass
class T2IRules:
    """Settings of the formulas; the defaults are the published programs'."""

    decimals: int = 4
    """Probabilities, and their product, are written with so many decimals before they are averaged; -1 = as they are."""
    confidence: float = 0.5
    """Objects that the detector is less sure of do not count."""
    spatial_floor: float = 0.5
    """A spatial score below it becomes 0."""
    near_pixels: float = 150.0
    """"Near" in pixels of the detector's input, whose sides are at most 479 and 480."""
    on_top_of: bool = False
    """Score "on top of" like "on the top of"; published, it has no branch and gets no points for its place."""

    def __post_init__(self) -> None:
        if self.confidence < FLOOR:
            raise ValueError(f"confidence below {FLOOR} needs other answers: objects below it are not kept")


def plan(prompts: Path, images: int, seed: int) -> Plan:
    """Pictures of a folder's `CATEGORY_val.txt` files, `CATEGORY/samples/PROMPT_ID.png`; image j of a prompt has seed + j.

    Args:
        prompts: the dataset's folder, or one of its `CATEGORY_val.txt`.
        images: per prompt.
        seed: of the first image.

    Raises:
        UserError: no such file, or a prompt that cannot be in a file's name.
    """
    folder = prompts if prompts.is_dir() else prompts.parent
    files = {category: folder / f"{category}_val.txt" for category in CATEGORIES}
    chosen = {name: path for name, path in files.items() if (prompts.is_dir() and path.is_file()) or path == prompts}
    if not chosen:
        raise UserError(f"--prompts {prompts}: no {', '.join(f'{name}_val.txt' for name in CATEGORIES)} there")
    pictures: list[BenchImage] = []
    for category, path in chosen.items():
        lines = [line.split("\t")[0].strip() for line in read_text(path).splitlines() if line.strip()]
        about: dict[str, Any] = {"category": category}
        if category == "numeracy":
            about["names"] = t2i_objects.read_names(folder / "new_objects.txt")
        groups = (
            {name: _lines(folder / f"complex_val_{name}.txt") for name in ("spatial", "action")} if category == "complex" else {}
        )
        for number, line in enumerate(lines):
            kind = next((name for name, members in groups.items() if _key(line) in members), "all")
            extra = {"parts": kind} if category == "complex" else {}
            for j in range(images):
                file = f"{category}/samples/{_named(line, path)}_{number * images + j:06d}.png"
                pictures.append(BenchImage(file, line, (seed + j,), about | extra))
    return Plan(pictures)


def _key(line: str) -> str:
    return line.split(".")[0].lower()


def _lines(path: Path) -> set[str]:
    return {_key(line) for line in read_text(path).splitlines()}


def _named(prompt: str, path: Path) -> str:
    """The prompt as the benchmark's own tools read it from a file's name, up to the first underscore."""
    if "/" in prompt or "_" in prompt or len(prompt.encode()) > MAX_NAME_LENGTH - len("_000000.png"):
        raise UserError(f"{path}: {prompt[:40]!r}... cannot be in a file's name, where T2I-CompBench's tools read it: shorten it")
    return prompt


def clean_question(chunk: str) -> str:
    """A noun chunk as BLIP's reader asks it: lower case, without punctuation, and a question mark."""
    return re.sub(r'([.!"()*#:;~])', "", f"{chunk}?".lower()).rstrip()


def ask(judges: Judges, picture: BenchImage, image: Image.Image) -> Answer:
    """P(yes) per noun chunk, objects found, similarity: what the picture's category needs."""
    category = picture.about["category"]
    if category == "non_spatial":
        return {"similarity": judges.clip.similarity(image, picture.prompt)}
    parsed = judges.phrases.parse(picture.prompt)
    answer: Answer = {}
    if category in ATTRIBUTES or category == "complex":
        questions = [clean_question(chunk) for chunk in parsed.chunks[:CHUNKS]]
        answer |= {"questions": questions, "yes": judges.vqa.yes(image, questions)}
    parts = picture.about.get("parts")
    if parts in ("action", "all"):
        answer["similarity"] = judges.clip.similarity(image, without_adjectives(parsed))
    names: list[str] = []
    if category == "spatial":
        names = t2i_objects.first_and_last_noun(parsed)
    elif parts in ("spatial", "all"):
        names = t2i_objects.nouns_around_preposition(parsed)
    elif category == "numeracy":
        wanted, numbers = t2i_objects.count_objects(parsed, picture.about["names"])
        names, answer["numbers"] = wanted, numbers
    if category in ("spatial", "numeracy") or parts in ("spatial", "all"):
        names = [t2i_objects.detector_name(name) for name in names]
        answer |= {"objects": names, "size": list(image.size)}
        found = judges.detector.detect(image, list(dict.fromkeys(names)), FLOOR)
        answer["found"] = [{"class": each.label, "score": each.score, "box": list(each.box)} for each in found]
    return answer


def without_adjectives(parsed: Parsed) -> str:
    """The prompt that CLIP compares in the complex category."""
    return " ".join(text for text, part in parsed.words if part != "ADJ")


def attribute(answer: Answer, rules: T2IRules) -> float:
    """Product of P(yes) over at most eight noun chunks; of none, 1."""
    product = 1.0
    for value in answer["yes"][:CHUNKS]:
        product *= _round(value, rules)
    return _round(product, rules)


def _round(value: float, rules: T2IRules) -> float:
    return value if rules.decimals < 0 else float(f"{value:.{rules.decimals}f}")


def _found(answer: Answer, rules: T2IRules) -> list[Box]:
    boxes = [Box(each["class"], each["score"], tuple(each["box"])) for each in answer["found"]]
    return sorted((box for box in boxes if box.score > rules.confidence), key=lambda box: -box.score)


def spatial(prompt: str, answer: Answer, rules: T2IRules) -> float:
    """A quarter of each object's confidence and half of its place, 0 below the floor."""
    if len(answer["objects"]) != 2:
        return 0.0
    first, second = answer["objects"]
    found = _found(answer, rules)
    a, b = (next((box for box in found if box.name == name), None) for name in (first, second))
    value = 0.25 * sum(box.score for box in (a, b) if box is not None)
    if a is not None and b is not None:
        relation = t2i_objects.find_relation(prompt, rules.on_top_of)
        scale = t2i_objects.detector_scale(*answer["size"])
        value += 0.5 * t2i_objects.place(relation, a.box, b.box, scale, rules.near_pixels)
    return value if value >= rules.spatial_floor else 0.0


def numeracy(answer: Answer, rules: T2IRules) -> float:
    """Each object weighs the same: half for being there, half for the right number."""
    return t2i_objects.score_counts(answer["objects"], answer["numbers"], _found(answer, rules))


def complex_score(prompt: str, parts: str, answer: Answer, rules: T2IRules) -> float:
    """Mean of the attribute score with the spatial one, the similarity, or both."""
    values = [attribute(answer, rules)]
    if parts in ("spatial", "all"):
        values.append(spatial(prompt, answer, rules))
    if parts in ("action", "all"):
        values.append(answer["similarity"])
    return mean(values)


def score_picture(picture: BenchImage, answer: Answer, rules: T2IRules) -> float:
    """A picture's score in its category."""
    category = picture.about["category"]
    if category in ATTRIBUTES:
        return attribute(answer, rules)
    if category == "spatial":
        return spatial(picture.prompt, answer, rules)
    if category == "numeracy":
        return numeracy(answer, rules)
    if category == "non_spatial":
        return answer["similarity"]
    return complex_score(picture.prompt, picture.about["parts"], answer, rules)


def score(pictures: Sequence[BenchImage], answers: Mapping[str, Answer], rules: T2IRules) -> Scores:
    """Mean over images per category; `overall` is LI-DiT's T2I-avg where all three attributes are there, else the mean."""
    values: dict[str, list[float]] = {}
    for picture in pictures:
        values.setdefault(picture.about["category"], []).append(score_picture(picture, answers[picture.file], rules))
    means = {category: mean(each) for category, each in values.items()}
    averaged = ATTRIBUTES if set(ATTRIBUTES) <= set(means) else tuple(means)
    return {"overall": mean([means[name] for name in averaged]), "categories": means, "averaged": list(averaged)}


def needs(pictures: Sequence[BenchImage]) -> set[str]:
    """What the categories need."""
    by_category = {
        **{name: {"vqa", "phrases"} for name in ATTRIBUTES},
        **{name: {"detector", "phrases"} for name in ("spatial", "numeracy")},
        "non_spatial": {"clip"},
        "complex": {"vqa", "detector", "clip", "phrases"},
    }
    return set().union(*(by_category[category] for category in {picture.about["category"] for picture in pictures}))


BENCH = Bench(
    "t2i_compbench", 10, plan, needs, ask, score, T2IRules, BLIP_SIDE,
    {"template": "{chunk}?", "chunks": CHUNKS, "kept_above": FLOOR},
)  # fmt: skip
