"""Kinds of previews, images and clips, and how well those of held-out scenes follow their captions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data_prep.scenes.captions import scene_prompts
from data_prep.scenes.moving import moving_prompts
from pipeline.following.motion import motion_chance, read_moving_scene, score_clips
from pipeline.following.reading import read_scene
from pipeline.following.scoring import SceneScores, chance_level, prompt_following, score_objects
from pipeline.inference.clips import make_contact_sheet, make_moving_grid, to_clips
from pipeline.inference.images import make_grid, to_images
from pipeline.stage.sampling import SamplingConfig


class PreviewKind(ABC):
    """Makes samples of pixels, grids of samples, and scores of those of scenes."""

    def __init__(self, sample: SamplingConfig) -> None:
        """Choose the held-out scenes that the stage asks for."""
        self.sample = sample
        self.captions: list[Any] = self.scenes(sample.scenes, sample.width / sample.height)

    @abstractmethod
    def scenes(self, count: int, aspect: float) -> list[Any]:
        """Return the captions of `count` held-out scenes, each with a `text`."""

    @abstractmethod
    def convert(self, pixels: Tensor) -> list[Any]:
        """Return decoded pixels as samples."""

    @abstractmethod
    def make_grid(self, samples: Sequence[Any], captions: Sequence[str]) -> Image.Image:
        """Lay out samples with their captions."""

    def make_moving_grid(self, samples: Sequence[Any], captions: Sequence[str]) -> bytes | None:
        """Return the grid as an animated WebP; None = it does not move."""
        return None

    @abstractmethod
    def read(self, sample: Any) -> list[Any]:
        """Return the objects that a sample of a scene shows."""

    @abstractmethod
    def score(self, found: Sequence[list[Any]]) -> tuple[SceneScores, dict[str, float]]:
        """Return the scores of the objects found in each scene's sample, and those of chance."""

    def scores(self, found: Sequence[list[Any]]) -> dict[str, float]:
        """Return the scores of the objects found in each scene's sample by name; empty without scenes."""
        judged, chance = self.score(found)
        scores = judged.summary()
        if chance:
            scores |= {"following": prompt_following(scores), "chance": prompt_following(chance)}
        return scores


class ImagePreviews(PreviewKind):
    """Previews of images."""

    def scenes(self, count: int, aspect: float) -> list[Any]:
        """Return the captions of `count` held-out scenes."""
        prompts = scene_prompts(count, "list", aspect, style=self.sample.scenes_style)
        return [prompt.caption for prompt in prompts]

    def convert(self, pixels: Tensor) -> list[Image.Image]:
        """Return pixels [B, 3, H, W] as images."""
        return to_images(pixels)

    def make_grid(self, samples: Sequence[Any], captions: Sequence[str]) -> Image.Image:
        """Lay out images."""
        return make_grid(samples, captions)

    def read(self, sample: Image.Image) -> list[Any]:
        """Return the objects of an image."""
        return read_scene(np.asarray(sample), self.sample.scenes_scale)

    def score(self, found: Sequence[list[Any]]) -> tuple[SceneScores, dict[str, float]]:
        """Return the scores of images of scenes."""
        return score_objects(found, self.captions), chance_level(found, self.captions)


class ClipPreviews(PreviewKind):
    """Previews of clips."""

    def scenes(self, count: int, aspect: float) -> list[Any]:
        """Return the captions of `count` held-out moving scenes."""
        prompts = moving_prompts(count, "list", aspect, style=self.sample.scenes_style)
        return [prompt.caption for prompt in prompts]

    def convert(self, pixels: Tensor) -> list[np.ndarray]:
        """Return pixels [B, 3, T, H, W] as clips."""
        return to_clips(pixels)

    def make_grid(self, samples: Sequence[Any], captions: Sequence[str]) -> Image.Image:
        """Lay out some frames of each clip."""
        return make_contact_sheet(samples, captions)

    def make_moving_grid(self, samples: Sequence[Any], captions: Sequence[str]) -> bytes:
        """Return all clips side by side as an animated WebP."""
        return make_moving_grid(samples, captions, self.sample.fps)

    def read(self, sample: np.ndarray) -> list[Any]:
        """Return the objects of a clip."""
        return read_moving_scene(sample, self.sample.scenes_scale)

    def score(self, found: Sequence[list[Any]]) -> tuple[SceneScores, dict[str, float]]:
        """Return the scores of clips of moving scenes."""
        return score_clips(found, self.captions), motion_chance(found, self.captions)


def preview_kind(sample: SamplingConfig) -> PreviewKind:
    """Return what the stage's previews show."""
    return ClipPreviews(sample) if sample.frames > 1 else ImagePreviews(sample)
