"""The contrast set: held-out prompts whose words alone do not say what to draw.

- `exchanged`: pairs of prompts of equal words, `A red circle and a blue square` and `A blue circle and a red
  square`. A point for each of the two images that fits its own prompt better than the other one; chance 50 %.
- `negation`: lists that end in `but no red square`, where something red and a square are asked for. A point
  if every claim is right, that of the absent object too.
- `distant`: the colors are in another sentence than the objects, in another order. The share of right claims.
- `relation`: a sentence with the position of an object relative to another one. A point if it is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from data_prep.scenes.captions import HELD_OUT_SEED, SceneCaption, caption_scene, list_text
from data_prep.scenes.contrast import caption_contrast
from data_prep.scenes.grammar import SceneStyle, sample_scene
from pipeline.following.binding import exchanged, fits_better
from pipeline.following.reading import DetectedObject
from pipeline.following.scoring import judge_caption

Contrast = Literal["exchanged", "negation", "distant", "relation"]
CONTRASTS: tuple[Contrast, ...] = get_args(Contrast)
SEED = HELD_OUT_SEED + 1
"""Seed of the scenes, which no training set has and no list of held-out prompts either."""
MAX_SCENES = 50
"""Scenes looked at for each prompt."""
LENGTHS = (2, 3, 4)
"""Numbers of segments, in turn; where there is less room, fewer."""

Detected = Sequence[DetectedObject]


def contrast_captions(kind: Contrast, count: int, aspect: float, style: SceneStyle) -> list[SceneCaption]:
    """Return the captions of one kind; of `exchanged`, pairs one after another.

    Args:
        kind: of the contrast.
        count: number of captions; even for `exchanged`.
        aspect: width / height of the images.
        style: that of the scenes of the dataset.

    Returns:
        The captions, fewer than `count` if hardly any scene of the style has one.
    """
    captions: list[SceneCaption] = []
    for index in range(count * MAX_SCENES):
        if len(captions) >= count:
            break
        scene = sample_scene(SEED, index, aspect, LENGTHS[index % len(LENGTHS)], style=style)
        plain = caption_scene(scene, "list", SEED, index)
        if kind == "exchanged":
            other = exchanged(plain)
            captions += () if other is None else (plain, replace(other, text=list_text(other.segments)))
        elif kind == "relation":
            sentence = caption_scene(scene, "sentence", SEED, index)
            captions += [sentence] if sentence.relations else []
        else:
            caption = caption_contrast(scene, kind, SEED, index)
            captions += [caption] if caption.text != plain.text else []

    return captions[:count]


def contrast_scores(
    kind: Contrast, detected: Sequence[Detected], captions: Sequence[SceneCaption]
) -> list[float]:
    """Return a score in [0, 1] per caption; of `exchanged`, per pair.

    Args:
        kind: of the contrast.
        detected: the objects of each caption's image.
        captions: as `contrast_captions` returns them.

    Raises:
        ValueError: if the numbers of images and captions differ.
    """
    if kind == "exchanged":
        points = []
        for number in range(0, len(captions), 2):
            one, other = captions[number : number + 2]
            first, second = detected[number : number + 2]
            points.append((fits_better(first, one, other) + fits_better(second, other, one)) / 2)
        return points
    return [_SCORES[kind](objects, caption) for objects, caption in zip(detected, captions, strict=True)]


def _whole(objects: Detected, caption: SceneCaption) -> float:
    return float(all(claim.correct for claim in judge_caption(0, objects, caption)))


def _share(objects: Detected, caption: SceneCaption) -> float:
    return float(np.mean([claim.correct for claim in judge_caption(0, objects, caption)]))


def _relation(objects: Detected, caption: SceneCaption) -> float:
    claims = judge_caption(0, objects, caption)
    return float(np.mean([claim.correct for claim in claims if claim.attribute == "relation"]))


_SCORES: dict[str, Callable[[Detected, SceneCaption], float]] = {
    "negation": _whole,
    "distant": _share,
    "relation": _relation,
}
