"""CLIP: the similarity of an image to a text, and the nearest of several classes."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from model.scorers.files import ScorerFiles, load_model, load_pretrained


class CLIPScorer:
    """Compares images with texts."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        """Load the model in fp32.

        Args:
            files: the scorer's folder.
            device: where it runs.

        Raises:
            UserError: if the folder contains another model.
        """
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(CLIPModel, files, device)
        self.identity = {**files.identity, "dtype": "float32"}

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors [B, C] of texts; texts longer than CLIP's context are truncated."""
        # CLIP's attention is causal and is read at the end token, so padding after it changes nothing.
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)))

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors [B, C] of images."""
        pixels = self.processor(images=list(images), return_tensors="pt")
        return _unit(self.model.get_image_features(**pixels.to(self.model.device)))

    def similarity(self, image: Image.Image, text: str) -> float:
        """Return the cosine similarity of an image and a text."""
        return float((self.images([image]) @ self.texts([text]).T).item())

    def classify(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[int]:
        """Return the index of the nearest class for each image.

        Args:
            images: the images.
            classes: texts of each class; its vector is the mean of their unit vectors.
        """
        if not images:
            return []

        # The mean of unit vectors is shorter than one, so it is brought to unit length again.
        centers = torch.cat([_unit(self.texts(texts).mean(0, keepdim=True)) for texts in classes])
        return (self.images(images) @ centers.T).argmax(1).tolist()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
