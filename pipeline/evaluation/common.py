"""What a public benchmark is made of: pictures to draw, answers of scorer models, and a formula over the answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from model.common.errors import UserError
from model.scorers.detectors import Detector
from model.scorers.noun_phrases import Parsed

Answer = dict[str, Any]
"""What the scorer models said of one picture: JSON."""
Scores = dict[str, Any]
"""Numbers by name, `overall` first; nested once for groups."""


@dataclass(frozen=True)
class BenchImage:
    """A file to draw."""

    file: str
    """Path in the layout of the benchmark's own tools."""
    prompt: str
    seeds: tuple[int, ...]
    """One, or those of a grid's cells row by row."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the benchmark asks of it."""


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn."""

    pictures: list[BenchImage]
    files: dict[str, str] = field(default_factory=dict)
    """Texts that the benchmark's own tools expect beside the pictures."""


class VQA(Protocol):
    """Answers questions about a picture."""

    identity: dict[str, Any]

    def yes(self, image: Image.Image, questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)), per question."""
        ...

    def answers(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers in words, lower case."""
        ...

    def likelihood(self, image: Image.Image, question: str, answer: str) -> float:
        """Geometric mean of the probabilities of the answer's tokens."""
        ...


class CLIP(Protocol):
    """Compares pictures with texts."""

    identity: dict[str, Any]

    def similarity(self, image: Image.Image, text: str) -> float:
        """Cosine of a picture and a text."""
        ...

    def classify(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[int]:
        """Index of each picture's nearest class, a class being several texts."""
        ...


class Grammar(Protocol):
    """Reads prompts."""

    identity: dict[str, Any]

    def parse(self, prompt: str) -> Parsed:
        """Words with their parts of speech, and noun chunks."""
        ...


class Features(Protocol):
    """Describes pictures by vectors."""

    identity: dict[str, Any]

    def features(self, images: Sequence[Image.Image]) -> Any:
        """fp32 [B, C]."""
        ...


class Judges(Protocol):
    """The scorer models of an evaluation; each is loaded when it is first used."""

    question: str
    """Template of VQAScore's question."""
    answer: str

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
    images: int
    """Pictures (or cells of a grid) per prompt, as published."""
    plan: Callable[[Path, int, int], Plan]
    """(prompts, images per prompt, seed)"""
    needs: Callable[[Sequence[BenchImage]], set[str]]
    """Which of `Judges` these pictures need."""
    ask: Callable[[Judges, BenchImage, Image.Image], Answer]
    score: Callable[[Sequence[BenchImage], Mapping[str, Answer], Any], Scores]
    """(pictures, answers by file, rules)"""
    rules: type
    """The formula's settings; the defaults are as published."""
    vqa_side: int | None = None
    """BLIP sees pictures of this size; None = the one it was trained with."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decides the answers, for the record."""


def read_text(path: Path) -> str:
    """A text file of the benchmark.

    Raises:
        UserError: it is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path) -> Any:
    """A JSON file of the benchmark.

    Raises:
        UserError: it is missing or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"--prompts {path}: not JSON: {error}") from error


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return sum(values) / len(values)
