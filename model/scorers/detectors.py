"""Object detectors as judges of pictures: Mask2Former with its fixed classes, OWL with any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    Mask2FormerForUniversalSegmentation,
)

from model.common.errors import UserError
from model.scorers.files import ScorerFiles, load_model, load_pretrained

MAX_DETECTIONS = 100
"""Objects per picture, Mask2Former's own setting."""
NMS = 0.5
"""Overlap from which OWL's weaker box of the same class is dropped; Mask2Former's queries do not repeat one another."""


@dataclass(frozen=True)
class Found:
    """An object in a picture."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the picture."""
    mask: np.ndarray[Any, Any] | None = None
    """bool [H, W], where the detector segments."""


class Detector(Protocol):
    """Finds objects."""

    identity: dict[str, Any]

    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Found]:
        """Objects of these classes with a score above `above`, the surest first."""
        ...


def load_detector(files: ScorerFiles, device: torch.device) -> Detector:
    """The detector of a folder.

    Raises:
        UserError: it holds neither a Mask2Former nor an OWL.
    """
    kind = load_pretrained(AutoConfig, files).model_type
    if kind == "mask2former":
        return Mask2Former(files, device)
    if kind in ("owlvit", "owlv2"):
        return OWL(files, device)
    raise UserError(f"{files.folder} holds a {kind}: detectors are mask2former, owlvit and owlv2")


class Mask2Former:
    """Instance segmentation with the classes that it was trained on."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        self.processor: Any = load_pretrained(AutoImageProcessor, files)
        self.model: Any = load_model(Mask2FormerForUniversalSegmentation, files, device)
        self.labels: list[str] = [self.model.config.id2label[index] for index in range(len(self.model.config.id2label))]
        self.identity = {**files.identity, "kind": "mask2former", "dtype": "float32"}

    @torch.no_grad()
    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Found]:
        """As `Detector.detect`.

        A score is the class probability times the mask's mean probability inside of itself (Mask2Former, section 3.3); a
        box is that of the mask.

        Raises:
            UserError: it does not know one of the classes.
        """
        unknown = sorted(set(classes) - set(self.labels))
        if unknown:
            raise UserError(f"{self.identity['name']} does not know {', '.join(unknown)}: take a detector that does, such as OWL")
        outputs = self.model(**self.processor(images=image, return_tensors="pt").to(self.model.device))
        scores = outputs.class_queries_logits[0].softmax(-1)[:, :-1].flatten()
        top = scores.topk(min(MAX_DETECTIONS, len(scores)))
        found: list[Found] = []
        for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            label = self.labels[index % len(self.labels)]
            if score <= above or label not in classes:  # the mask's part of the score is at most 1
                continue
            logits = self._resize(outputs.masks_queries_logits[0, index // len(self.labels)], image)
            mask = logits > 0
            if not mask.any():
                continue
            score *= float(logits.sigmoid()[mask].mean())
            if score > above:
                found.append(Found(label, score, _box(mask), mask.cpu().numpy()))
        return sorted(found, key=lambda each: -each.score)

    def _resize(self, logits: Tensor, image: Image.Image) -> Tensor:
        size = (image.height, image.width)
        return torch.nn.functional.interpolate(logits[None, None].float(), size=size, mode="bilinear")[0, 0]


class OWL:
    """Boxes of whatever is named."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(AutoModelForZeroShotObjectDetection, files, device)
        self.template = "a photo of a {}"
        self.identity = {**files.identity, "kind": "owl", "template": self.template, "nms": NMS, "dtype": "float32"}

    @torch.no_grad()
    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Found]:
        """As `Detector.detect`."""
        names = list(dict.fromkeys(classes))
        if not names:
            return []
        texts = [[self.template.format(name) for name in names]]
        inputs = self.processor(text=texts, images=image, truncation=True, return_tensors="pt").to(self.model.device)
        result = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=above, target_sizes=[(image.height, image.width)]
        )[0]
        boxes, scores, labels = (result[key].cpu() for key in ("boxes", "scores", "labels"))
        boxes = clip_boxes_to_image(boxes, (image.height, image.width))
        inside = remove_small_boxes(boxes, 1.0)
        boxes, scores, labels = boxes[inside], scores[inside], labels[inside]
        kept = batched_nms(boxes, scores, labels, NMS).tolist()
        return [Found(names[int(labels[i])], float(scores[i]), _four(boxes[i].tolist())) for i in kept]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def _four(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = values
    return left, top, right, bottom
