"""The end of a demo: it generates images, measures them, and shows some in the report."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.functional import has_bf16
from pipeline.demonstration.commands import run
from pipeline.reporting.extra import ShownImage, Tile
from pipeline.stage.config import StageConfig

MAX_SHOWN = 24
"""Images in the report; all are measured."""


class Ending(ABC):
    """The last part of a demo, which generates and measures images with the trained network."""

    note: ClassVar[str]
    """Sentence below the report's images."""
    drawn: Path
    """Folder of the images."""

    def __init__(self, stage: StageConfig) -> None:
        self.stage = stage

    @abstractmethod
    def sample_images(self) -> None:
        """Generate the images."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """Return what the images show, as values that JSON has."""

    @abstractmethod
    def tiles(self, measured: dict[str, Any]) -> list[Tile]:
        """Return what was measured as key numbers of the report."""

    @abstractmethod
    def details(self, number: int, image: Path) -> dict[str, Any]:
        """Return what the report shows with an image: `real` (its training image) or `marks` (its claims)."""

    def sample(self, prompts: Path, *words: str) -> None:
        """Run `pipeline.sample` on a file of prompts."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # As the network was trained, where that is not slower.
        precision = "bf16" if has_bf16(device) else "fp32"
        words = ("--precision", precision, "--out", str(self.drawn), *words)
        run("pipeline.sample", str(self.stage.run), "--prompts", str(prompts), *words)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the images, in the order of the prompts."""
        return [json.loads(line) for line in (self.drawn / "index.jsonl").read_text().splitlines()]

    def shown_images(self) -> list[ShownImage]:
        """Return the images of the report, evenly chosen, with paths relative to the run."""
        records = self.records()
        count = min(MAX_SHOWN, len(records))
        shown: list[ShownImage] = []
        for number in (index * len(records) // count for index in range(count)):
            file = self.drawn / records[number]["file"]
            details = self.details(number, file)
            record = {"caption": records[number]["prompt"], "drawn": self.relative(file), **details}
            shown.append(cast(ShownImage, record))

        return shown

    def relative(self, file: Path) -> str:
        """Return a path relative to the run, as the report's records have it."""
        return str(file.relative_to(self.stage.run))


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as fp32 [B, 3, H, W] in [0, 255]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
