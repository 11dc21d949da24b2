"""Held-out prompts of moving scenes, and the scores of clips that were generated from them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.scenes.captions import HELD_OUT_SEED
from data_prep.scenes.moving import (
    MovingCaptionKind,
    MovingPrompt,
    caption_moving_scene,
    sample_moving_scene,
)
from pipeline.following.motion import motion_chance, read_moving_scene, score_clips


def held_out_prompts(
    count: int,
    kind: MovingCaptionKind,
    objects: int | None = None,
    aspect: float = 1.0,
    seed: int = HELD_OUT_SEED,
    scale: float = 1.0,
) -> list[MovingPrompt]:
    """Return the first `count` scenes of a seed, with their captions.

    Args:
        count: number of prompts.
        kind: of the captions.
        objects: of each scene; None = any number.
        aspect: width / height of the clips.
        seed: of the scenes; the default is that of no training set.
        scale: size of the scenes' objects.
    """
    prompts: list[MovingPrompt] = []
    for index in itertools.count():
        if len(prompts) == count:
            break
        scene = sample_moving_scene(seed, index, aspect, scale)
        if objects in (None, len(scene.segments)):
            prompts.append(MovingPrompt(scene, caption_moving_scene(scene, kind, seed, index)))
    return prompts


def score_moving(
    clips: Iterable[np.ndarray], prompts: Sequence[MovingPrompt], per_prompt: int, scale: float = 1.0
) -> dict[str, Any]:
    """Score clips of moving scenes.

    Args:
        clips: uint8 [T, H, W, 3], the clips of each prompt one after another.
        prompts: the prompts.
        per_prompt: number of clips per prompt.
        scale: size of the scenes' objects.

    Returns:
        Shares of correct claims by attribute, those of clips against other prompts (`chance`), and tables of
        (share, number of claims).
    """
    captions = [prompt.caption for prompt in prompts]
    detected = [read_moving_scene(clip, scale) for clip in clips]
    scores = score_clips(detected, [captions[number // per_prompt] for number in range(len(detected))])
    by_attribute = {str(key): list(entry) for key, entry in scores.by_attribute().items()}
    return {
        "summary": scores.summary(),
        # the first clip of each prompt, since the captions are listed once per prompt
        "chance": motion_chance(detected[::per_prompt], captions),
        "by_attribute": by_attribute,
    }
