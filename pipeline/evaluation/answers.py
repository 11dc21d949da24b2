"""Second stage of a public benchmark: scorer models answer about each picture, a line of JSON per picture."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import Progress

from model.common.errors import UserError
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
PUBLISHED = {
    "vqa": "geneval: none; dpg: mPLUG-large; t2i_compbench: BLIP VQA (capfilt, large); genai_bench: CLIP-FlanT5-XXL",
    "detector": "geneval: Mask2Former Swin-S on COCO; t2i_compbench: UniDet",
    "clip": "geneval: CLIP ViT-L/14; t2i_compbench: CLIP ViT-B/32",
    "inception": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth",
    "phrases": "en_core_web_sm",
}
"""Scorer models that the benchmarks were published with."""


class ScorerModels:
    """The scorer models that were named, each loaded when it is first used."""

    def __init__(
        self, sources: dict[str, str | None], vqa_side: int | None, question: str, answer: str, device: torch.device
    ) -> None:
        """Load nothing yet.

        Args:
            sources: folder or `OWNER/NAME@COMMIT` by option; None = not named.
            vqa_side: size of the pictures that BLIP sees.
            question: template of VQAScore.
            answer: whose probability VQAScore is.
            device: where they run.
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
        """Name, revision and settings of the models that are needed.

        Raises:
            UserError: one is not named, or cannot be loaded.
        """
        for name in sorted(needed):
            self._source(name)
        return {name: getattr(self, name).identity for name in sorted(needed)}

    def _source(self, name: str) -> str:
        source = self.sources.get(name)
        if not source:
            raise UserError(f"this benchmark needs --{name}: a folder or OWNER/NAME@COMMIT (published with {PUBLISHED[name]})")
        return source


def read_answers(out: Path) -> dict[str, Answer]:
    """The answers so far by picture; a line that is not whole was being written when its process was killed."""
    answers: dict[str, Answer] = {}
    for path in sorted((out / ANSWERS).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                answers[record["file"]] = record["answer"]
    return answers


def answer_missing(bench: Bench, judges: Any, pictures: Sequence[BenchImage], out: Path, part: str, shows: bool) -> int:
    """Let the scorer models answer about this process's pictures that have no answer; returns how many those were.

    Args:
        bench: what is asked.
        judges: the scorer models.
        pictures: this process's.
        out: the evaluation's folder.
        part: name of this process's file of answers.
        shows: whether to show a progress bar.

    Raises:
        UserError: pictures are missing or damaged.
    """
    known = read_answers(out)
    missing = [picture for picture in pictures if picture.file not in known]
    undrawn = [picture.file for picture in missing if not (out / IMAGES / picture.file).is_file()]
    if undrawn:
        raise UserError(
            f"{out}: {len(undrawn)} pictures are not drawn, {undrawn[0]} the first: run --stage images on every share"
        )
    path = out / ANSWERS / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_unfinished(path)
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(console=CONSOLE, disable=not (shows and CONSOLE.is_terminal)) as progress,
    ):
        for picture in progress.track(missing, description="answering"):
            answer = bench.ask(judges, picture, _open(out / IMAGES / picture.file))
            file.write(json.dumps({"file": picture.file, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()
    return len(missing)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: not a picture ({error}): remove it, and draw it again with --stage images") from error


def _cut_unfinished(path: Path) -> None:
    """Drop a last line that is not whole, so that the next one does not continue it."""
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
