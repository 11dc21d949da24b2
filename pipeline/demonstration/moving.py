"""The end of the demo on moving scenes: clips of prompts that were never trained on are scored exactly."""

from pathlib import Path
from typing import Any, ClassVar

from data_prep.clips.media import decode_clip
from data_prep.config import DatasetConfig, ScenesConfig
from data_prep.scenes.moving import moving_prompts
from pipeline.demonstration.commands import run
from pipeline.demonstration.scenes import ScenesEnding
from pipeline.following.motion import read_moving_scene, score_clips
from pipeline.stage.config import StageConfig

OBJECTS = 1
"""Objects of a prompt, as of the training clips."""
UNSEEN = 0
"""The combination of color, shape and motion that the demo's dataset leaves out."""


class MovingEnding(ScenesEnding):
    """Generates clips of held-out moving scenes, and counts the right claims."""

    note: ClassVar[str] = (
        "None of the prompts was trained on. Each claim is judged by what moves in the clip."
    )

    def __init__(self, stage: StageConfig, dataset: DatasetConfig, images: int) -> None:
        super().__init__(stage, dataset, images)
        self.style = (dataset.sources[0].scenes or ScenesConfig()).style

    def sample_images(self) -> None:
        """Write the prompts, and generate a clip of each."""
        prompts = ["--prompts", "moving", "--count", str(self.count), "--segments", str(OBJECTS)]
        prompts += ["--scale", str(self.style.scale), *(["--plain"] if self.style.plain else [])]
        prompts += ["--objects", str(self.style.objects)] if self.style.objects else []
        prompts += ["--combination", str(UNSEEN)]
        run("pipeline.follow", "write", str(self.folder), *prompts)
        source = [str(self.stage.run), "--prompts", str(self.folder / "prompts.txt")]
        run("pipeline.sample", *source, "--own-seeds", "--out", str(self.drawn))

    def details(self, number: int, image: Path) -> dict[str, Any]:
        """Return the judgment of each claim of the prompt."""
        prompts = moving_prompts(self.count, "list", style=self.style, objects=OBJECTS, combination=UNSEEN)
        caption = prompts[number].caption
        clip = decode_clip(image.read_bytes(), self.stage.sample.frames)
        marks: list[str] = []
        for claim in score_clips([read_moving_scene(clip, self.style.scale)], [caption]).claims:
            attribute = "color" if claim.attribute == "colour" else claim.attribute
            marks.append(f"{'✓' if claim.correct else '✗'} {attribute}")
        return {"marks": marks}
