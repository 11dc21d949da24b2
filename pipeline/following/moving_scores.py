"""Scores of clips that were generated from prompts of moving scenes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.scenes.moving import MovingPrompt
from pipeline.following.motion import motion_chance, read_moving_scene, score_clips


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
