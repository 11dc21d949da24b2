import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.follow import make_prompts
from pipeline.following.natural_prompts import ADJECTIVES, NOUNS, natural_prompts
from pipeline.following.positional_bias import positional_bias, scene_segment_scores
from pipeline.following.scoring import score_objects
from tests.helpers.scenes import true_objects

SETTINGS = {"prompts": "scenes", "count": 14, "segments": None, "kind": "list", "aspect": 1.0, "seed": 3}


@given(st.lists(st.integers(2, 8), min_size=1, max_size=30), st.floats(-1, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_straight_line_is_recovered_from_prompts_of_any_length(lengths, slope, start):
    bias = positional_bias([start + slope * np.linspace(0, 1, length) for length in lengths])
    expected = start + slope * np.array(bias.positions)
    for point, value in zip(bias.curve, expected, strict=True):
        assert point.low <= point.mean + 1e-9
        assert point.mean <= point.high + 1e-9
        assert point.mean == pytest.approx(value, abs=1e-9)
    assert bias.slope.mean == pytest.approx(slope, abs=1e-9)
    assert bias.gap.mean == pytest.approx(slope, abs=1e-9)
    assert bias.prompts == len(lengths)


def test_the_band_contains_the_true_gap_about_as_often_as_it_claims():
    random = np.random.default_rng(0)
    hits = []
    for _ in range(60):
        bias = positional_bias((random.random((60, 4)) < [0.8, 0.7, 0.6, 0.5]).astype(float))
        hits.append(bias.gap.low <= -0.3 <= bias.gap.high)
    assert 0.85 <= np.mean(hits) <= 1.0


def test_prompts_of_one_segment_are_refused():
    with pytest.raises(UserError, match="two or more"):
        positional_bias([[1.0], [0.0]])


def test_forgetting_the_end_of_scene_prompts_shows():
    prompts = make_prompts({**SETTINGS, "count": 70})
    detected = []
    for prompt in prompts:
        half = (len(prompt.caption.segments) + 1) // 2
        groups = {prompt.scene.segments.index(segment) for segment in prompt.caption.segments[:half]}
        whole = true_objects(prompt.scene)
        detected.append(
            [
                item
                for item, rendered in zip(whole, prompt.scene.objects, strict=True)
                if rendered.group in groups
            ]
        )
    captions = [prompt.caption for prompt in prompts]
    bias = positional_bias(scene_segment_scores(score_objects(detected, captions)))
    assert bias.gap.mean == -1.0
    assert bias.slope.high < 0

    everything = [true_objects(prompt.scene) for prompt in prompts]
    unbiased = positional_bias(scene_segment_scores(score_objects(everything, captions)))
    assert {point.mean for point in unbiased.curve} == {1.0}
    assert unbiased.gap.low == unbiased.gap.high == 0


def test_scores_of_several_images_are_averaged():
    prompts = make_prompts(SETTINGS)
    detected = [objects for prompt in prompts for objects in (true_objects(prompt.scene), [])]
    captions = [prompt.caption for prompt in prompts for _ in range(2)]
    for prompt, scores in zip(
        prompts, scene_segment_scores(score_objects(detected, captions), images=2), strict=True
    ):
        assert scores == [0.5] * len(prompt.caption.segments)


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_natural_prompts_name_their_segments_in_order(seed, segments):
    (prompt,) = natural_prompts(1, seed, segments)
    assert len(prompt.segments) == segments
    text = prompt.text.lower()
    places = [text.index(segment) for segment in prompt.segments]
    assert places == sorted(places)
    words = [segment.split()[1:] for segment in prompt.segments]
    assert len({noun for _, noun in words}) == segments
    assert all(adjective in ADJECTIVES and noun in NOUNS for adjective, noun in words)
