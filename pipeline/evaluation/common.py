"""The parts of a public benchmark: images to generate, answers of scorer models, a formula over them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from model.common.errors import UserError
from model.common.records import STRICT
from model.scorers.detectors import Detector
from model.scorers.noun_phrases import Parsed

Answer = dict[str, Any]
"""The answers of the scorer models about one image, as JSON."""
Scores = dict[str, Any]
"""Numbers by name, `overall` first. A group of numbers is a nested dictionary."""


@dataclass(frozen=True)
class BenchImage:
    """One file of images to generate."""

    __pydantic_config__ = STRICT

    file: str
    """Path in the layout of the benchmark's own tools."""
    prompt: str
    seeds: tuple[int, ...]
    """One seed, or the seeds of a grid's cells row by row."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts of the benchmark about this image, such as its questions."""


@dataclass(frozen=True)
class Plan:
    """All images of a benchmark."""

    images: list[BenchImage]
    files: dict[str, str] = field(default_factory=dict)
    """Text files that the benchmark's own tools expect next to the images: path -> text."""


class VQA(Protocol):
    """A model that answers questions about an image."""

    identity: dict[str, Any]

    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """Return P(yes) / (P(yes) + P(no)) of each question."""
        ...

    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Return an answer in words, in lower case, to each question."""
        ...

    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Return the geometric mean of the probabilities of the answer's tokens."""
        ...


class CLIP(Protocol):
    """A model that compares images with texts."""

    identity: dict[str, Any]

    def similarity(self, image: Image.Image, text: str) -> float:
        """Return the cosine of an image and a text."""
        ...

    def classify(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[int]:
        """Return the index of each image's nearest class. A class is a list of texts."""
        ...


class Grammar(Protocol):
    """A parser of prompts."""

    identity: dict[str, Any]

    def parse(self, prompt: str) -> Parsed:
        """Return the words with their parts of speech, and the noun chunks."""
        ...


class Features(Protocol):
    """A model that describes images by vectors."""

    identity: dict[str, Any]

    def features(self, images: Sequence[Image.Image]) -> Any:
        """Return fp32 features [B, C]."""
        ...


class Judges(Protocol):
    """The scorer models of an evaluation. Each is loaded when it is first used."""

    question: str
    """Template of VQAScore's question."""
    answer: str
    """The answer whose probability is VQAScore."""

    @property
    def vqa(self) -> VQA: ...  # noqa: D102
    @property
    def detector(self) -> Detector: ...  # noqa: D102
    @property
    def clip(self) -> CLIP: ...  # noqa: D102
    @property
    def phrases(self) -> Grammar: ...  # noqa: D102
    @property
    def inception(self) -> Features: ...  # noqa: D102


@dataclass(frozen=True)
class Bench:
    """A public benchmark."""

    name: str
    images_per_prompt: int
    """Images (or cells of a grid) per prompt, as published."""
    plan: Callable[[Path, int, int], Plan]
    """(prompts, images per prompt, seed) -> the images to generate."""
    needs: Callable[[Sequence[BenchImage]], set[str]]
    """Names of the `Judges` that these images need."""
    ask: Callable[[Judges, BenchImage, Image.Image], Answer]
    """(scorer models, entry of the plan, its pixels) -> the answers."""
    score: Callable[[Sequence[BenchImage], Mapping[str, Answer], Any], Scores]
    """(images, answers by file, rules) -> the scores."""
    rules: type
    """Dataclass of the formula's settings. Its defaults are as published."""
    vqa_side: int | None = None
    """Side of the images that BLIP reads, in pixels; None = the one it was trained with."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All else that the answers depend on, for the record."""


def read_text(path: Path) -> str:
    """Read a text file of the benchmark.

    Raises:
        UserError: if the file is missing or is not UTF-8.
    """
    try:
        # a byte order mark, which editors on Windows write, is no part of the text
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of the benchmark.

    Raises:
        UserError: if the file is missing or is not JSON.
    """
    try:
        # a UserError of `read_text` is no ValueError and passes through
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"--prompts {path}: not JSON: {error}") from error


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    return sum(values) / len(values)


def iou(a: Sequence[float], b: Sequence[float], pixel: float = 0.0) -> float:
    """Return the intersection over union of two boxes; 0 for boxes without area.

    Args:
        a: left, top, right, bottom.
        b: the other box.
        pixel: 1 if a box includes the pixels at `right` and `bottom`, else 0.
    """

    def area(left: float, top: float, right: float, bottom: float) -> float:
        # boxes that do not meet have a negative side, and two of them would make a positive area
        return max(right - left + pixel, 0) * max(bottom - top + pixel, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0
