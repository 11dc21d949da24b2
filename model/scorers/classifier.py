"""Image classifiers of transformers: the probabilities of labels, such as `nsfw` or `watermark`."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from model.common.errors import UserError
from model.scorers.files import ScorerFiles, load_model, load_pretrained


class ImageClassifier:
    """Gives the probability of some of its labels."""

    def __init__(self, files: ScorerFiles, device: torch.device, labels: Sequence[str]) -> None:
        """Load the model in fp32.

        Args:
            files: the model's folder.
            device: where it runs.
            labels: labels whose probabilities are wanted.

        Raises:
            UserError: if the folder contains another model, or the model has no such label.
        """
        self.processor: Any = load_pretrained(AutoImageProcessor, files)
        self.model: Any = load_model(AutoModelForImageClassification, files, device)
        self.identity = {**files.identity, "dtype": "float32"}
        known = {str(name): int(number) for number, name in self.model.config.id2label.items()}
        missing = [label for label in labels if label not in known]
        if missing:
            raise UserError(f"{files.folder}: has no label {missing[0]!r}: it has {', '.join(known)}")
        self._labels = {label: known[label] for label in labels}

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> dict[str, list[float]]:
        """Return the probability of each label for each image."""
        pixels = self.processor(images=list(images), return_tensors="pt")
        shares = self.model(**pixels.to(self.model.device)).logits.float().softmax(-1)  # [B, labels]
        return {label: shares[:, number].tolist() for label, number in self._labels.items()}
