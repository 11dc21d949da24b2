"""The scorer of moving scenes reads what the generator drew, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.scenes.grammar import SceneStyle
from data_prep.scenes.moving import MOTIONS, moving_prompts, render_moving_scene
from pipeline.following.motion import motion_chance, read_moving_scene, score_clips


def drawn(count, seed, frames=9, side=64, scale=1.0):
    prompts = moving_prompts(count, seed=seed, style=SceneStyle(scale))
    return prompts, [render_moving_scene(prompt.scene, frames, side, side) for prompt in prompts]


def shares(count, seed, **size):
    prompts, clips = drawn(count, seed, **size)
    detected = [read_moving_scene(clip, prompts[0].scene.scale) for clip in clips]
    captions = [prompt.caption for prompt in prompts]
    return score_clips(detected, captions), motion_chance(detected, captions), captions


@pytest.mark.parametrize("size", [{}, {"side": 32, "scale": 1.6}], ids=["64 px", "32 px, large objects"])
def test_the_scorer_reads_its_own_drawings(size):
    scores, chance, captions = shares(24, seed=11, **size)
    assert scores.summary()["motion"] >= 0.97
    assert scores.summary()["caption"] >= 0.9
    assert chance["motion"] < 0.2
    stated = sum(
        2 + 1 + sum(x is not None for x in (s.segment.size, s.segment.texture, s.speed))
        for caption in captions
        for s in caption.segments
    )
    assert len(scores.claims) == stated


@pytest.mark.slow
@pytest.mark.parametrize("size", [{}, {"side": 32, "scale": 1.6}], ids=["64 px", "32 px, large objects"])
def test_the_scorer_reads_99_5_percent_of_its_drawings(size):
    scores, chance, _ = shares(700, seed=12, frames=17, **size)
    correct = [claim.correct for claim in scores.claims]
    assert np.mean(correct) >= 0.995
    assert scores.by_attribute()["motion"][0] >= 0.995
    assert scores.by_attribute()["speed"][0] >= 0.995
    assert chance["motion"] < 0.1


def test_other_motion_is_judged_wrong():
    """Played backwards, directions, growth and nothing else are wrong."""
    prompts, clips = drawn(12, seed=13)
    scores = score_clips([read_moving_scene(clip[::-1]) for clip in clips], [p.caption for p in prompts])
    still = sum(item.motion == "still" for prompt in prompts for item in prompt.caption.segments)
    total = sum(len(prompt.caption.segments) for prompt in prompts)
    table = scores.by_attribute()
    assert table["motion"][0] == pytest.approx(still / total, abs=0.05)
    assert table["colour"][0] == table["shape"][0] == 1.0


def test_each_motion_can_be_told_from_a_held_frame():
    prompts, clips = drawn(8, seed=14)
    for prompt, clip in zip(prompts, clips, strict=True):
        held = read_moving_scene(np.repeat(clip[:1], 9, axis=0))
        assert {found.motion for found in held} == {"still"}
        caption = prompt.caption
        wrong = replace(
            caption,
            segments=tuple(
                replace(item, motion=MOTIONS[MOTIONS.index(item.motion) - 1]) for item in caption.segments
            ),
        )
        claims = score_clips([read_moving_scene(clip)], [wrong]).by_attribute()
        assert claims["motion"][0] == 0.0


def test_clips_without_objects_have_only_wrong_claims():
    prompts = moving_prompts(3)
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 64, 64, 3), np.uint8)
    flat = np.full((5, 64, 64, 3), 128, np.uint8)
    assert read_moving_scene(flat) == []
    scores = score_clips([read_moving_scene(clip) for clip in noise], [p.caption for p in prompts])
    assert scores.summary()["caption"] == 0.0
    with pytest.raises(ValueError, match="argument"):
        score_clips([[]], [])
