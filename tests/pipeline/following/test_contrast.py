"""Scores of the contrast set: 1 for the truth, chance for images of words without their binding."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.scenes.captions import scene_prompts
from data_prep.scenes.grammar import SceneStyle
from pipeline.following.contrast import CONTRASTS, contrast_captions, contrast_scores
from pipeline.following.reading import DetectedObject

PLAIN = SceneStyle(1.6, plain=True, objects=4)


def objects_of(caption, random):
    """Return objects that a caption claims, in a row."""
    found = []
    for segment in caption.segments:
        for _ in range(segment.count):
            found.append(DetectedObject(segment.colour, segment.shape, "large", "plain", len(found) / 9, 0.0))
    return found


@pytest.mark.parametrize("kind", CONTRASTS)
def test_prompts_are_as_many_as_asked_for_and_the_first_ones_are_the_same(kind):
    captions = contrast_captions(kind, 24, 1.0, PLAIN)
    assert len(captions) == 24
    assert contrast_captions(kind, 8, 1.0, PLAIN) == captions[:8]
    assert len({caption.text for caption in captions}) > 20
    held_out = {prompt.caption.text for prompt in scene_prompts(200, "list", style=PLAIN)}
    assert not held_out >= {caption.text for caption in captions}


@pytest.mark.parametrize("kind", ["exchanged", "negation", "distant"])
def test_images_as_claimed_score_one_and_empty_ones_at_most_chance(kind):
    random = np.random.default_rng(0)
    captions = contrast_captions(kind, 40, 1.0, PLAIN)
    assert set(contrast_scores(kind, [objects_of(each, random) for each in captions], captions)) == {1.0}
    empty = contrast_scores(kind, [[] for _ in captions], captions)
    assert np.mean(empty) == (0.5 if kind == "exchanged" else 0.0)


def test_pairs_have_the_same_words_and_images_of_the_other_prompt_score_nothing():
    captions = contrast_captions("exchanged", 40, 1.0, PLAIN)
    for one, other in zip(captions[::2], captions[1::2], strict=True):
        words = [sorted(each.text.lower().replace("an ", "a ").strip(".").split()) for each in (one, other)]
        assert words[0] == words[1] or len(one.segments) != len(other.segments)
        assert one.text != other.text
    random = np.random.default_rng(0)
    swapped = [objects_of(captions[number ^ 1], random) for number in range(len(captions))]
    assert set(contrast_scores("exchanged", swapped, captions)) == {0.0}


def test_an_object_that_should_be_absent_costs_the_point():
    captions = contrast_captions("negation", 10, 1.0, PLAIN)
    random = np.random.default_rng(0)
    detected = []
    for caption in captions:
        (absent,) = caption.absent
        surplus = DetectedObject(absent.colour, absent.shape, "large", "plain", 0.9, 0.9)
        detected.append([*objects_of(caption, random), surplus])
    assert set(contrast_scores("negation", detected, captions)) == {0.0}


def test_a_relation_counts_alone():
    captions = contrast_captions("relation", 10, 1.0, PLAIN)
    offsets = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for caption in captions:
        (relation,) = caption.relations
        x, y = offsets[relation.direction]
        for sign, score in ((1, 1.0), (-1, 0.0)):
            right = objects_of(caption, None)
            first = sum(segment.count for segment in caption.segments[: relation.subject])
            second = sum(segment.count for segment in caption.segments[: relation.other])
            right[first] = replace(right[first], x=0.5 + sign * 0.3 * x, y=0.5 + sign * 0.3 * y)
            right[second] = replace(right[second], x=0.5, y=0.5)
            assert contrast_scores("relation", [right], [caption]) == [score]
