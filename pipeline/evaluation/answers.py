"""Second stage of a public benchmark: scorer models answer about each image. One line of JSON per image."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import torch
from PIL import Image
from typing_extensions import TypedDict

from model.common.errors import UserError
from model.common.progress import Progress
from model.common.records import OPEN
from model.scorers.clip import CLIPScorer
from model.scorers.detectors import Detector, load_detector
from model.scorers.files import find_scorer
from model.scorers.image_text import load_vqa
from model.scorers.inception import Inception
from model.scorers.noun_phrases import NounPhrases
from pipeline.evaluation.common import VQA, Answer, Bench, BenchImage
from pipeline.evaluation.images import IMAGES
from pipeline.runtime.console import CONSOLE

ANSWERS, SCORER = "answers", "scorer.json"


class Scorer(TypedDict):
    """`scorer.json`: the scorer models, and the settings that they answered with."""

    # The benchmark's own settings are beside these.
    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    models: dict[str, dict[str, Any]]
    reference: NotRequired[str]
    """Folder of the images that others are compared with."""


PUBLISHED = {
    "vqa": (
        "geneval: none; dpg: mPLUG-large; t2i_compbench: BLIP VQA (capfilt, large); "
        "genai_bench: CLIP-FlanT5-XXL"
    ),
    "detector": "geneval: Mask2Former Swin-S on COCO; t2i_compbench: UniDet",
    "clip": "geneval: CLIP ViT-L/14; t2i_compbench: CLIP ViT-B/32",
    "inception": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "phrases": "en_core_web_sm",
}
"""Scorer models that the benchmarks were published with."""


class ScorerModels:
    """The scorer models that the user named. Each is loaded when it is first used."""

    def __init__(
        self,
        sources: dict[str, str | None],
        vqa_side: int | None,
        question: str,
        answer: str,
        device: torch.device,
    ) -> None:
        """Load nothing yet.

        Args:
            sources: folder or `OWNER/NAME@COMMIT` of each option; None = not named.
            vqa_side: side of the images that BLIP reads, in pixels.
            question: template of VQAScore's question.
            answer: the answer whose probability is VQAScore.
            device: device to run on.
        """
        self.sources = sources
        self.vqa_side = vqa_side
        self.question = question
        self.answer = answer
        self.device = device

    @cached_property
    def vqa(self) -> VQA:
        """BLIP, or any image-text-to-text model."""
        return load_vqa(find_scorer(self._source("vqa"), "--vqa"), self.device, self.vqa_side)

    @cached_property
    def detector(self) -> Detector:
        """Mask2Former or OWL."""
        return load_detector(find_scorer(self._source("detector"), "--detector"), self.device)

    @cached_property
    def clip(self) -> CLIPScorer:
        """CLIP."""
        return CLIPScorer(find_scorer(self._source("clip"), "--clip"), self.device)

    @cached_property
    def inception(self) -> Inception:
        """Inception of the original FID."""
        return Inception(Path(self._source("inception")), self.device)

    @cached_property
    def phrases(self) -> NounPhrases:
        """spaCy."""
        return NounPhrases(self._source("phrases"))

    def identity(self, needed: set[str]) -> dict[str, Any]:
        """Return name, revision and settings of the models that are needed.

        Raises:
            UserError: if a model is not named, or cannot be loaded.
        """
        # all names are checked before the first model is loaded
        for name in sorted(needed):
            self._source(name)
        # this loads the models: the identity is read from their files
        return {name: getattr(self, name).identity for name in sorted(needed)}

    def _source(self, name: str) -> str:
        source = self.sources.get(name)
        if not source:
            raise UserError(
                f"this benchmark needs --{name}: a folder or OWNER/NAME@COMMIT "
                f"(published with {PUBLISHED[name]})"
            )
        return source


def read_answers(out: Path) -> dict[str, Answer]:
    """Return the answers so far by file; a last line that a killed process cut short is skipped."""
    answers: dict[str, Answer] = {}
    # all files, since the shares of an earlier start may have been others
    for path in sorted((out / ANSWERS).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                answers[record["file"]] = record["answer"]
    return answers


def answer_missing(
    bench: Bench, judges: Any, images: Sequence[BenchImage], out: Path, part: str, shows: bool
) -> int:
    """Let the scorer models answer about those of this process's images that have no answer yet.

    Args:
        bench: the benchmark, which asks.
        judges: the scorer models.
        images: images of this process.
        out: folder of the evaluation.
        part: name of this process's file of answers.
        shows: show a progress bar.

    Returns:
        The number of images without an answer.

    Raises:
        UserError: if images are missing or damaged.
    """
    known = read_answers(out)
    unanswered = [image for image in images if image.file not in known]
    missing = [image.file for image in unanswered if not (out / IMAGES / image.file).is_file()]
    if missing:
        raise UserError(
            f"{out}: {len(missing)} images do not exist, {missing[0]} the first: "
            "run --stage images on every share"
        )

    path = out / ANSWERS / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # a killed process may have left an incomplete line
    _cut_unfinished(path)
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(
            "answering", len(unanswered), "images", console=CONSOLE, shows=shows, lines=False
        ) as progress,
    ):
        for image in unanswered:
            answer = bench.ask(judges, image, open_image(out / IMAGES / image.file))
            file.write(json.dumps({"file": image.file, "answer": answer}, ensure_ascii=False) + "\n")
            # a killed process loses only the image that it was asking about
            file.flush()
            progress.advance()

    return len(unanswered)


def open_image(path: Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: if the file is not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(
            f"{path}: not an image ({error}): remove it, and generate it again with --stage images"
        ) from error


def _cut_unfinished(path: Path) -> None:
    """Drop an incomplete last line, so that the next line does not continue it."""
    if path.is_file():
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            path.write_bytes(complete)
