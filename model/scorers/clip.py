"""CLIP as a judge of pictures: similarity to a text, and the nearest of several classes."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from model.scorers.files import ScorerFiles, load_model, load_pretrained


class CLIPScorer:
    """Compares pictures with texts."""

    def __init__(self, files: ScorerFiles, device: torch.device) -> None:
        """Load it in fp32.

        Raises:
            UserError: the folder holds another model.
        """
        self.processor: Any = load_pretrained(AutoProcessor, files)
        self.model: Any = load_model(CLIPModel, files, device)
        self.identity = {**files.identity, "dtype": "float32"}

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, C] of texts; what is longer than CLIP's context is cut."""
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)))

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [B, C] of pictures."""
        pixels = self.processor(images=list(images), return_tensors="pt")
        return _unit(self.model.get_image_features(**pixels.to(self.model.device)))

    def similarity(self, image: Image.Image, text: str) -> float:
        """Cosine of a picture and a text."""
        return float((self.images([image]) @ self.texts([text]).T).item())

    def classify(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]) -> list[int]:
        """Index of each picture's nearest class; a class is the mean of its texts' unit vectors."""
        if not images:
            return []
        centres = torch.cat([_unit(self.texts(texts).mean(0, keepdim=True)) for texts in classes])
        return (self.images(images) @ centres.T).argmax(1).tolist()


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
