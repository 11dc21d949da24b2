"""Binding: drawn scenes fit their own captions, the exchanged ones do not, and words alone are chance."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.scenes.captions import scene_prompts
from pipeline.following.binding import binding, exchanged
from pipeline.following.reading import DetectedObject
from tests.helpers.scenes import true_objects

PROMPTS = scene_prompts(40, "list", segments=[2, 3, 4])
CAPTIONS = [prompt.caption for prompt in PROMPTS]
OBJECTS = [true_objects(prompt.scene) for prompt in PROMPTS]


def words(caption):
    stated = [segment.stated.values() for segment in caption.segments]
    return Counter(value for values in stated for value in values)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(deadline=None, max_examples=40)
def test_the_exchanged_caption_has_the_same_words_and_another_binding(seed, segments):
    (prompt,) = scene_prompts(1, "list", segments=[segments], seed=seed)
    other = exchanged(prompt.caption)
    if other is None:
        return
    assert words(other) == words(prompt.caption)
    assert set(other.segments[:2]).isdisjoint(prompt.caption.segments)
    assert other.segments[2:] == prompt.caption.segments[2:]


def test_true_scenes_bind_and_those_of_the_exchanged_captions_do_not():
    share, count = binding(OBJECTS, CAPTIONS)
    assert share == 1.0
    assert count >= 35

    wrong = []
    for prompt, objects in zip(PROMPTS, OBJECTS, strict=True):
        other = exchanged(prompt.caption)
        places = {segment: number for number, segment in enumerate(prompt.caption.segments)}
        drawn = []
        for item, found in zip(prompt.scene.objects, objects, strict=True):
            if other is None:
                break
            segment = other.segments[places[prompt.scene.segments[item.group]]]
            drawn.append(replace(found, colour=segment.colour, shape=segment.shape))
        wrong.append(drawn)
    assert binding(wrong, CAPTIONS)[0] < 0.05


def test_nothing_and_single_objects_say_nothing():
    assert binding([[] for _ in CAPTIONS], CAPTIONS)[0] == 0.5
    single = scene_prompts(4, "list", segments=[1])
    assert binding([true_objects(p.scene) for p in single], [p.caption for p in single]) == (0.0, 0)
    assert all(isinstance(item, DetectedObject) for objects in OBJECTS for item in objects)
