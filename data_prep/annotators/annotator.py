"""The interface of annotators, and those that the settings mean."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from data_prep.model_settings import AnnotatorConfig
from data_prep.plan.expressions import finite
from model.common.errors import UserError
from model.common.extras import require
from model.scorers.classifier import ImageClassifier
from model.scorers.clip import CLIPScorer
from model.scorers.files import ScorerFiles, find_scorer
from model.scorers.head import EmbeddingHead

Columns = Mapping[str, Sequence[Any]]
"""Column -> a value per image."""


class Annotator(Protocol):
    """Looks at images."""

    widths: dict[str, int]
    """Numbers of each column that is an embedding."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the values."""
        ...

    def annotate(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Columns:
        """Return the values of the columns for some images, each with its captions."""
        ...


def open_annotator(settings: AnnotatorConfig, allow_functions: bool) -> Annotator:
    """Load what an entry of `annotations` names.

    Raises:
        UserError: if there is no such model, package or function, or functions are not allowed.
    """
    if settings.kind == "clip":
        return ClipAnnotator(settings)
    if settings.kind == "classifier":
        return ClassifierAnnotator(settings)
    if settings.kind == "language":
        return LanguageAnnotator(settings)
    return FunctionAnnotator(settings, allow_functions)


def _files(settings: AnnotatorConfig) -> ScorerFiles:
    pinned = f"{settings.model}@{settings.revision}" if settings.revision else settings.model
    return find_scorer(pinned, f"annotations {settings.name}: model")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ClipAnnotator:
    """CLIP: the similarity of image and caption, and small heads on the image's embedding."""

    def __init__(self, settings: AnnotatorConfig) -> None:
        self._settings = settings
        device = _device()
        self._clip = CLIPScorer(_files(settings), device)
        self._heads: dict[str, EmbeddingHead] = {}
        for head in settings.heads:
            self._heads[head.column] = EmbeddingHead(head.weights, head.activation, head.output, device)
        self.widths: dict[str, int] = {}
        if settings.embedding:
            self.widths[f"{settings.name}_embedding"] = int(self._clip.model.config.projection_dim)

    @property
    def identity(self) -> dict[str, Any]:
        """Model, and the weights of the heads."""
        heads = {column: head.identity for column, head in self._heads.items()}
        return {**self._clip.identity, "heads": heads}

    def annotate(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Columns:
        """Return the cosine with the first caption, the heads' values and, if wanted, the embedding."""
        vectors = self._clip.images(images)  # [B, C]
        texts = self._clip.texts([own[0] if own else "" for own in captions])  # [B, C]
        name = self._settings.name
        columns: dict[str, Sequence[Any]] = {f"{name}_score": (vectors * texts).sum(1).tolist()}
        for column, head in self._heads.items():
            columns[column] = head(vectors).tolist()
        if self._settings.embedding:
            columns[f"{name}_embedding"] = list(vectors.half().cpu().numpy())
        return columns


class ClassifierAnnotator:
    """An image classifier of transformers: the probability of some of its labels."""

    def __init__(self, settings: AnnotatorConfig) -> None:
        self._classifier = ImageClassifier(_files(settings), _device(), list(settings.labels))
        self._labels = settings.labels
        self.widths: dict[str, int] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The model."""
        return self._classifier.identity

    def annotate(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Columns:
        """Return a column of probabilities per label."""
        probabilities = self._classifier.probabilities(images)
        return {column: probabilities[label] for label, column in self._labels.items()}


class LanguageAnnotator:
    """The language of the first caption, as ISO 639-1 has it."""

    def __init__(self, settings: AnnotatorConfig) -> None:
        require("annotate", "py3langid")
        import py3langid  # pyright: ignore[reportMissingImports]

        self._column = settings.name
        self.widths: dict[str, int] = {}
        self._classify: Callable[[str], tuple[str, float]] = py3langid.classify

    @property
    def identity(self) -> dict[str, Any]:
        """The package."""
        from importlib.metadata import version

        return {"name": "py3langid", "revision": version("py3langid")}

    def annotate(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Columns:
        """Return the language; None without a caption."""
        return {self._column: [self._classify(own[0])[0] if own else None for own in captions]}


class FunctionAnnotator:
    """A function of the user's: `module:function`, from images and captions to columns."""

    def __init__(self, settings: AnnotatorConfig, allowed: bool) -> None:
        """Import the function, which runs its module's code.

        Raises:
            UserError: if that is not allowed, or there is no such function.
        """
        if not allowed:
            raise UserError(
                f"annotations {settings.name}: runs the function {settings.function}: add --allow-functions "
                "if you trust it"
            )
        module, _, name = settings.function.partition(":")
        try:
            self._function: Callable[..., Columns] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"annotations {settings.name}: function={settings.function!r}: {error}: give module:function "
                "of a module on PYTHONPATH"
            ) from error
        self._settings = settings
        self.widths: dict[str, int] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The function's name; nobody knows its content."""
        return {"name": self._settings.function, "revision": self._settings.revision}

    def annotate(self, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Columns:
        """Return the declared columns.

        Raises:
            UserError: if the function returns others, or another number of values.
        """
        found = self._function(list(images), [list(own) for own in captions])
        columns: dict[str, Sequence[Any]] = {}
        for column, kind in self._settings.columns.items():
            values = list(found.get(column, ())) if isinstance(found, Mapping) else []
            if len(values) != len(images):
                raise UserError(
                    f"annotations {self._settings.name}: {self._settings.function} returned {len(values)} "
                    f"values of `{column}` for {len(images)} images: return one per image"
                )
            columns[column] = [
                finite(value) if kind == "number" else (None if value is None else str(value)[:1000])
                for value in values
            ]
        return columns
