"""The end of the demo on scenes: images of prompts that were never trained on are scored exactly."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from typing_extensions import TypedDict

from data_prep.config import DatasetConfig, ScenesConfig
from data_prep.scenes.captions import scene_prompts
from model.common.records import OPEN, read_record
from pipeline.demonstration.commands import run
from pipeline.demonstration.ending import Ending
from pipeline.following.reading import read_scene
from pipeline.following.scoring import judge_caption
from pipeline.reporting.extra import Tile
from pipeline.stage.config import StageConfig


class Scores(TypedDict):
    """Fields of `scores.json` that the demo reads."""

    __pydantic_config__ = OPEN  # pyright: ignore[reportGeneralTypeIssues]

    summary: dict[str, float]
    chance: dict[str, float]


UNSEEN = 0
"""The combination of attributes that the demos' datasets leave out (`combination_of`)."""
NAMES = {"colour": "colors", "segment": "whole objects", "caption": "whole prompts"}
"""Names of the scorer's tables in the report, where they differ; the others get a plural."""


class ScenesEnding(Ending):
    """Generates images of held-out scenes, and counts the right claims."""

    note: ClassVar[str] = (
        "Each prompt names an object whose color and shape were never trained on together. Each claim is "
        "judged, with its object's number in the prompt."
    )
    kind: ClassVar[str] = "scenes"
    segments: ClassVar[int] = 2
    """Objects of a prompt; the training scenes have one or two."""

    def __init__(self, stage: StageConfig, dataset: DatasetConfig, images: int) -> None:
        super().__init__(stage)
        self.count, self.folder = images, stage.run / "follow"
        self.drawn = self.folder / "pictures"
        self.style = (dataset.sources[0].scenes or ScenesConfig()).style

    @cached_property
    def prompts(self) -> Sequence[Any]:
        """The prompts, each with its `caption`, as `follow write` makes them of the same settings."""
        return scene_prompts(
            self.count, "list", segments=[self.segments], style=self.style, combination=UNSEEN
        )

    def sample_images(self) -> None:
        """Write the prompts, and generate an image of each."""
        words = ["--prompts", self.kind, "--count", str(self.count), "--segments", str(self.segments)]
        words += ["--scale", str(self.style.scale), *(["--plain"] if self.style.plain else [])]
        words += ["--objects", str(self.style.objects)] if self.style.objects else []
        words += ["--combination", str(UNSEEN)]
        run("pipeline.follow", "write", str(self.folder), *words)
        self.sample(self.folder / "prompts.txt", "--own-seeds", "--together", "--batch", "32")

    def measure(self) -> dict[str, Any]:
        """Return the shares of right claims, and those of images against other prompts."""
        run("pipeline.follow", "score", str(self.folder))
        scores = read_record(self.folder / "scores.json", Scores, f"remove {self.folder}")
        return {"right": scores["summary"], "chance": scores["chance"]}

    def tiles(self, measured: dict[str, Any]) -> list[Tile]:
        """Return the share of each kind of claim, with that of chance."""
        tiles: list[Tile] = []
        for name, share in measured["right"].items():
            chance = measured["chance"].get(name, 0.0)
            label = f"{NAMES.get(name, f'{name}s')} right in {self.count} new prompts (chance {chance:.1%})"
            tiles.append({"label": label, "value": f"{share:.1%}"})
        return tiles

    def details(self, number: int, image: Path) -> dict[str, Any]:
        """Return the judgment of each claim of the prompt."""
        objects = read_scene(np.asarray(Image.open(image).convert("RGB")), self.style.scale)
        marks: list[str] = []
        for claim in judge_caption(0, objects, self.prompts[number].caption):
            attribute = "color" if claim.attribute == "colour" else claim.attribute
            marks.append(f"{'✓' if claim.correct else '✗'} {attribute} {claim.position + 1}")
        return {"marks": marks}
