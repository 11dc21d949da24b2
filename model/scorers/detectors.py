"""Object detectors: Mask2Former with its fixed classes, OWL with any."""

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
"""Objects per image, Mask2Former's own setting."""
NMS = 0.5
"""Overlap (IoU) above which the weaker of OWL's boxes of the same class is dropped.

Mask2Former needs none: its queries do not repeat each other.
"""


@dataclass(frozen=True)
class Detection:
    """An object in an image."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the image."""
    mask: np.ndarray[Any, Any] | None = None
    """bool [H, W], if the detector segments."""


class Detector(Protocol):
    """Finds objects."""

    identity: dict[str, Any]

    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Detection]:
        """Detect objects.

        Args:
            image: the image.
            classes: names of the classes.
            above: lowest score, not included.

        Returns:
            Objects of these classes, the highest score first.
        """
        ...


def load_detector(files: ScorerFiles, device: torch.device) -> Detector:
    """Load the detector of a folder.

    Args:
        files: the scorer's folder.
        device: where it runs.

    Raises:
        UserError: if the folder contains neither a Mask2Former nor an OWL.
    """
    kind = load_pretrained(AutoConfig, files).model_type
    if kind == "mask2former":
        return Mask2Former(files, device)
    if kind in ("owlvit", "owlv2"):
        return OWL(files, device)
    raise UserError(f"{files.folder} contains a {kind}: detectors are mask2former, owlvit and owlv2")


class Mask2Former:
    """Instance segmentation with the classes that it was trained on."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        self.processor: Any = load_pretrained(AutoImageProcessor, files)
        self.model: Any = load_model(Mask2FormerForUniversalSegmentation, files, device)
        self.labels: list[str] = [
            self.model.config.id2label[index] for index in range(len(self.model.config.id2label))
        ]
        self.identity = {**files.identity, "kind": "mask2former", "dtype": "float32"}

    @torch.no_grad()
    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Detection]:
        """Detect objects, as described in `Detector.detect`.

        A score is the class probability times the mean probability of the mask's own pixels (Mask2Former,
        section 3.3). A box is the bounding box of the mask.

        Raises:
            UserError: if the model does not know one of the classes.
        """
        unknown = sorted(set(classes) - set(self.labels))
        if unknown:
            raise UserError(
                f"{self.identity['name']} does not know {', '.join(unknown)}: "
                "take a detector that does, such as OWL"
            )

        outputs = self.model(**self.processor(images=image, return_tensors="pt").to(self.model.device))
        # The last class is "no object". As in Mask2Former's own code, a query may give several classes.
        scores = outputs.class_queries_logits[0].softmax(-1)[:, :-1].flatten()
        top = scores.topk(min(MAX_DETECTIONS, len(scores)))

        detections: list[Detection] = []
        for score, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            label = self.labels[index % len(self.labels)]
            # The mask's factor is at most 1, so most masks need not be resized.
            if score <= above or label not in classes:
                continue
            logits = self._resize(outputs.masks_queries_logits[0, index // len(self.labels)], image)
            mask = logits > 0
            if not mask.any():
                continue

            score *= float(logits.sigmoid()[mask].mean())
            if score > above:
                detections.append(Detection(label, score, _box(mask), mask.cpu().numpy()))

        return sorted(detections, key=lambda detection: -detection.score)

    def _resize(self, logits: Tensor, image: Image.Image) -> Tensor:
        size = (image.height, image.width)
        return torch.nn.functional.interpolate(logits[None, None].float(), size=size, mode="bilinear")[0, 0]


class OWL:
    """Open-vocabulary detection: boxes of any class that is named."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(AutoModelForZeroShotObjectDetection, files, device)
        self.template = "a photo of a {}"
        self.identity = {
            **files.identity,
            "kind": "owl",
            "template": self.template,
            "nms": NMS,
            "dtype": "float32",
        }

    @torch.no_grad()
    def detect(self, image: Image.Image, classes: Sequence[str], above: float) -> list[Detection]:
        """Detect objects, as described in `Detector.detect`."""
        # A class that is named twice would be detected twice.
        names = list(dict.fromkeys(classes))
        if not names:
            return []

        texts = [[self.template.format(name) for name in names]]
        inputs = self.processor(text=texts, images=image, truncation=True, return_tensors="pt").to(
            self.model.device
        )
        result = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=above, target_sizes=[(image.height, image.width)]
        )[0]

        boxes, scores, labels = (result[key].cpu() for key in ("boxes", "scores", "labels"))
        # OWL's boxes may reach beyond the image, or be empty.
        boxes = clip_boxes_to_image(boxes, (image.height, image.width))
        inside = remove_small_boxes(boxes, 1.0)
        boxes, scores, labels = boxes[inside], scores[inside], labels[inside]

        detections: list[Detection] = []
        for index in batched_nms(boxes, scores, labels, NMS).tolist():
            left, top, right, bottom = boxes[index].tolist()
            detections.append(
                Detection(names[int(labels[index])], float(scores[index]), (left, top, right, bottom))
            )

        return detections


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """Return the bounding box of a mask bool [H, W]."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    # The right and bottom edges are those of the last pixels.
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
