"""T2I-CompBench (Huang et al. 2023): attributes by BLIP-VQA, positions by a detector, actions by CLIP.

Formulas are those of its public programs, quirks included; quirks that a user may want to change are rules.
Its detector is UniDet; name any other together with the score. 3-D positions are not scored here. "T2I-avg"
in LI-DiT's tables is the mean of color, shape and texture.
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
from pipeline.evaluation.common import Answer, Bench, BenchImage, Judges, Plan, Scores, mean, read_text
from pipeline.evaluation.t2i_objects import FLOOR, Box

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "numeracy", "non_spatial", "complex")
CHUNKS = 8
"""Maximum number of noun chunks per prompt that BLIP is asked about."""
BLIP_SIDE = 480
"""Side of the images that BLIP reads here, in pixels."""
MAX_NAME_LENGTH = 255
"""Maximum length of a file's name in bytes."""


@dataclass
class T2IRules:
    """Settings of the formulas; the defaults are the published programs'."""

    decimals: int = 4
    """Decimals to which probabilities, and their product, are rounded; -1 = no rounding."""
    confidence: float = 0.5
    """Confidence above which a detected object counts."""
    spatial_floor: float = 0.5
    """A lower spatial score becomes 0."""
    near_pixels: float = 150.0
    """"Near" in pixels of the detector's input, whose sides are at most 479 and 480."""
    on_top_of: bool = False
    """Score "on top of" like "on the top of"; as published, it gets no points for its position."""

    def __post_init__(self) -> None:
        if self.confidence < FLOOR:
            raise ValueError(f"confidence below {FLOOR} needs other answers: objects below it are not stored")


def plan(prompts: Path, images_per_prompt: int, seed: int) -> Plan:
    """Plan the images of a folder's `CATEGORY_val.txt` files as `CATEGORY/samples/PROMPT_ID.png`.

    Image j of a prompt has seed + j.

    Args:
        prompts: the dataset's folder, or one of its `CATEGORY_val.txt`.
        images_per_prompt: number of images per prompt.
        seed: seed of the first image.

    Raises:
        UserError: if there is no such file, or a prompt cannot be part of a file's name.
    """
    folder = prompts if prompts.is_dir() else prompts.parent
    paths = {category: folder / f"{category}_val.txt" for category in CATEGORIES}
    chosen = {
        name: path for name, path in paths.items() if path == prompts or (prompts.is_dir() and path.is_file())
    }
    if not chosen:
        raise UserError(f"--prompts {prompts}: no {', '.join(path.name for path in paths.values())} there")

    images: list[BenchImage] = []
    for category, path in chosen.items():
        about: dict[str, Any] = {"category": category}
        # the numeracy formula needs singular and plural of every object
        if category == "numeracy":
            about["names"] = t2i_objects.read_names(folder / "new_objects.txt")
        parts = _read_parts(folder) if category == "complex" else {}

        # a line may have further columns after a tab
        lines = [line.split("\t")[0].strip() for line in read_text(path).splitlines() if line.strip()]
        for number, line in enumerate(lines):
            extra: dict[str, Any] = {}
            if category == "complex":
                # a complex prompt that is in neither list has both parts
                extra["parts"] = next((name for name, keys in parts.items() if _key(line) in keys), "all")
            for j in range(images_per_prompt):
                # consecutive over all images of a category, as the benchmark's tools number them
                identifier = number * images_per_prompt + j
                file = f"{category}/samples/{_check_name(line, path)}_{identifier:06d}.png"
                images.append(BenchImage(file, line, (seed + j,), about | extra))

    return Plan(images)


def _read_parts(folder: Path) -> dict[str, set[str]]:
    """Return the keys of the complex prompts that have a spatial part only, or an action only."""
    parts: dict[str, set[str]] = {}
    for name in ("spatial", "action"):
        lines = read_text(folder / f"complex_val_{name}.txt").splitlines()
        parts[name] = {_key(line) for line in lines}
    return parts


def _key(line: str) -> str:
    return line.split(".")[0].lower()


def _check_name(prompt: str, path: Path) -> str:
    """Return the prompt if it can be part of a file's name, where the benchmark's own tools read it."""
    if "/" in prompt or "_" in prompt or len(prompt.encode()) > MAX_NAME_LENGTH - len("_000000.png"):
        raise UserError(
            f"{path}: {prompt[:40]!r}... cannot be in a file's name, where T2I-CompBench's tools read it: "
            "shorten it"
        )
    return prompt


def clean_question(chunk: str) -> str:
    """Return the question about a noun chunk: lower case, without punctuation, with a question mark."""
    return re.sub(r'([.!"()*#:;~])', "", f"{chunk}?".lower()).rstrip()


def ask(judges: Judges, entry: BenchImage, image: Image.Image) -> Answer:
    """Return P(yes) per noun chunk, detected objects, similarity: what the image's category needs."""
    category = entry.about["category"]
    if category == "non_spatial":
        return {"similarity": judges.clip.similarity(image, entry.prompt)}

    parsed = judges.phrases.parse(entry.prompt)
    answer: Answer = {}
    if category in ATTRIBUTES or category == "complex":
        # as published, BLIP is asked about each noun chunk with its adjectives, `a red book?`
        questions = [clean_question(chunk) for chunk in parsed.chunks[:CHUNKS]]
        answer |= {"questions": questions, "yes": judges.vqa.yes(image, questions)}

    parts = entry.about.get("parts")
    if parts in ("action", "all"):
        answer["similarity"] = judges.clip.similarity(image, without_adjectives(parsed))

    names: list[str] = []
    if category == "spatial":
        names = t2i_objects.first_and_last_noun(parsed)
    elif parts in ("spatial", "all"):
        names = t2i_objects.nouns_around_preposition(parsed)
    elif category == "numeracy":
        names, answer["numbers"] = t2i_objects.count_objects(parsed, entry.about["names"])

    # the detector is asked once for all objects, also those that appear twice
    if category in ("spatial", "numeracy") or parts in ("spatial", "all"):
        # the size is stored for the scale of `near`, so scoring needs no image
        classes = [t2i_objects.detector_name(name) for name in names]
        answer |= {"objects": classes, "size": list(image.size)}
        detections = judges.detector.detect(image, list(dict.fromkeys(classes)), FLOOR)
        answer["found"] = [
            {"class": found.label, "score": found.score, "box": list(found.box)} for found in detections
        ]

    return answer


def without_adjectives(parsed: Parsed) -> str:
    """Return the text that CLIP compares in the complex category."""
    return " ".join(text for text, part in parsed.words if part != "ADJ")


def attribute(answer: Answer, rules: T2IRules) -> float:
    """Return the product of P(yes) over at most eight noun chunks; 1 without any."""
    product = 1.0
    for value in answer["yes"][:CHUNKS]:
        # the published program stores each probability as rounded text and multiplies those
        product *= _round(value, rules)
    return _round(product, rules)


def _round(value: float, rules: T2IRules) -> float:
    return value if rules.decimals < 0 else float(f"{value:.{rules.decimals}f}")


def _boxes(answer: Answer, rules: T2IRules) -> list[Box]:
    """Return the detected objects that count, the most confident first."""
    boxes = [Box(found["class"], found["score"], tuple(found["box"])) for found in answer["found"]]
    return sorted((box for box in boxes if box.score > rules.confidence), key=lambda box: -box.score)


def spatial(prompt: str, answer: Answer, rules: T2IRules) -> float:
    """Return a quarter of each object's confidence plus half of their position's score; 0 below the floor."""
    # as published, a prompt without two objects scores 0
    if len(answer["objects"]) != 2:
        return 0.0
    first, second = answer["objects"]
    # the most confident box of each object counts
    best: dict[str, Box] = {}
    for box in _boxes(answer, rules):
        best.setdefault(box.name, box)
    a, b = best.get(first), best.get(second)

    value = 0.25 * sum(box.score for box in (a, b) if box is not None)
    if a is not None and b is not None:
        relation = t2i_objects.find_relation(prompt, rules.on_top_of)
        # `near_pixels` is in pixels of UniDet's input, so that published numbers can be compared
        scale = t2i_objects.detector_scale(*answer["size"])
        value += 0.5 * t2i_objects.score_position(relation, a.box, b.box, scale, rules.near_pixels)

    return value if value >= rules.spatial_floor else 0.0


def numeracy(answer: Answer, rules: T2IRules) -> float:
    """Return the mean over objects of: half for being detected, half for the right number."""
    return t2i_objects.score_counts(answer["objects"], answer["numbers"], _boxes(answer, rules))


def complex_score(prompt: str, parts: str, answer: Answer, rules: T2IRules) -> float:
    """Return the mean of the attribute score and the spatial score, the similarity, or both."""
    values = [attribute(answer, rules)]
    if parts in ("spatial", "all"):
        values.append(spatial(prompt, answer, rules))
    if parts in ("action", "all"):
        values.append(answer["similarity"])
    return mean(values)


def score_image(image: BenchImage, answer: Answer, rules: T2IRules) -> float:
    """Return an image's score in its category."""
    category = image.about["category"]
    if category in ATTRIBUTES:
        return attribute(answer, rules)
    if category == "spatial":
        return spatial(image.prompt, answer, rules)
    if category == "numeracy":
        return numeracy(answer, rules)
    if category == "non_spatial":
        return answer["similarity"]

    return complex_score(image.prompt, image.about["parts"], answer, rules)


def score(images: Sequence[BenchImage], answers: Mapping[str, Answer], rules: T2IRules) -> Scores:
    """Return the mean over images of each category.

    `overall` is LI-DiT's T2I-avg if all three attributes are there, else the mean over the categories.
    """
    values: dict[str, list[float]] = {}
    for image in images:
        values.setdefault(image.about["category"], []).append(score_image(image, answers[image.file], rules))

    means = {category: mean(of_images) for category, of_images in values.items()}
    # LI-DiT's tables have no other categories
    averaged = ATTRIBUTES if set(ATTRIBUTES) <= set(means) else tuple(means)
    return {
        "overall": mean([means[name] for name in averaged]),
        "categories": means,
        "averaged": list(averaged),
    }


def needs(images: Sequence[BenchImage]) -> set[str]:
    """The models of the images' categories."""
    models: dict[str, set[str]] = {
        **{attribute: {"vqa", "phrases"} for attribute in ATTRIBUTES},
        **{category: {"detector", "phrases"} for category in ("spatial", "numeracy")},
        "non_spatial": {"clip"},
        "complex": {"vqa", "detector", "clip", "phrases"},
    }
    categories = {image.about["category"] for image in images}
    return set().union(*(models[category] for category in categories))


SETTINGS = {"template": "{chunk}?", "chunks": CHUNKS, "kept_above": FLOOR}
BENCH = Bench("t2i_compbench", 10, plan, needs, ask, score, T2IRules, BLIP_SIDE, SETTINGS)
