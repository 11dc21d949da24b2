"""The end of the demo on moving scenes: clips of prompts that were never trained on are scored exactly."""

from pathlib import Path
from typing import Any, ClassVar

from data_prep.clips.media import decode_clip
from data_prep.config import DatasetConfig, ScenesConfig
from model.common.records import read_record
from pipeline.demonstration.commands import run
from pipeline.demonstration.ending import Ending
from pipeline.demonstration.scenes import NAMES, Scores
from pipeline.following.motion import read_moving_scene, score_clips
from pipeline.following.moving_prompts import held_out_prompts
from pipeline.reporting.extra import Tile
from pipeline.stage.config import StageConfig

OBJECTS = 1
"""Objects of a prompt, as of the training clips."""


class MovingEnding(Ending):
    """Generates clips of held-out moving scenes, and counts the right claims."""

    note: ClassVar[str] = (
        "None of the prompts was trained on. Each claim is judged by what moves in the clip."
    )

    def __init__(self, stage: StageConfig, dataset: DatasetConfig, images: int) -> None:
        super().__init__(stage)
        self.count, self.folder = images, stage.run / "follow"
        self.scale = (dataset.sources[0].scenes or ScenesConfig()).scale
        self.drawn = self.folder / "pictures"

    def sample_images(self) -> None:
        """Write the prompts, and generate a clip of each."""
        prompts = ["--prompts", "moving", "--count", str(self.count), "--segments", str(OBJECTS)]
        run("pipeline.follow", "write", str(self.folder), *prompts, "--scale", str(self.scale))
        source = [str(self.stage.run), "--prompts", str(self.folder / "prompts.txt")]
        run("pipeline.sample", *source, "--own-seeds", "--out", str(self.drawn))

    def measure(self) -> dict[str, Any]:
        """Return the shares of right claims, and those of clips against other prompts."""
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
        prompts = held_out_prompts(self.count, "list", OBJECTS, scale=self.scale)
        caption = prompts[number].caption
        clip = decode_clip(image.read_bytes(), self.stage.sample.frames)
        marks: list[str] = []
        for claim in score_clips([read_moving_scene(clip, self.scale)], [caption]).claims:
            attribute = "color" if claim.attribute == "colour" else claim.attribute
            marks.append(f"{'✓' if claim.correct else '✗'} {attribute}")
        return {"marks": marks}
