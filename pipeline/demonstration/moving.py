"""The end of the demo on moving scenes: clips of prompts that were never trained on are scored exactly."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from data_prep.clips.media import decode_clip
from data_prep.scenes.moving import moving_prompts
from pipeline.demonstration.scenes import UNSEEN, ScenesEnding
from pipeline.following.motion import read_moving_scene, score_clips


class MovingEnding(ScenesEnding):
    """Generates clips of held-out moving scenes, and counts the right claims."""

    note: ClassVar[str] = (
        "No prompt's combination of color, shape and motion was trained on. Each claim is judged by what "
        "moves in the clip."
    )
    kind: ClassVar[str] = "moving"
    segments: ClassVar[int] = 1

    @cached_property
    def prompts(self) -> Sequence[Any]:
        """The prompts, each with its `caption`, as `follow write` makes them of the same settings."""
        return moving_prompts(self.count, "list", style=self.style, objects=self.segments, combination=UNSEEN)

    def details(self, number: int, image: Path) -> dict[str, Any]:
        """Return the judgment of each claim of the prompt."""
        caption = self.prompts[number].caption
        clip = decode_clip(image.read_bytes(), self.stage.sample.frames)
        marks: list[str] = []
        for claim in score_clips([read_moving_scene(clip, self.style.scale)], [caption]).claims:
            attribute = "color" if claim.attribute == "colour" else claim.attribute
            marks.append(f"{'✓' if claim.correct else '✗'} {attribute}")
        return {"marks": marks}
