import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from data_prep.scenes.captions import CAPTION_KINDS, caption_scene, scene_prompts
from data_prep.scenes.grammar import COLORS, SHAPES, SIZES, TEXTURES, SceneStyle, sample_scene
from data_prep.scenes.rendering import render_scene
from pipeline.following.reading import read_scene
from pipeline.following.scoring import chance_level, judge_caption, score_objects
from tests.helpers.scenes import change_object, true_objects

VALUES = {"colour": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
PROMPTS = scene_prompts(28)
CAPTIONS = [prompt.caption for prompt in PROMPTS]


def score_images(images, captions):
    return score_objects([read_scene(image) for image in images], captions)


def worn(image):
    """The image after a mild blur, of one hundredth of its side, and JPEG of quality 75."""
    file = io.BytesIO()
    blur = ImageFilter.GaussianBlur(min(image.shape[:2]) / 100)
    Image.fromarray(image).filter(blur).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize(("wear", "least"), [(None, 0.995), (worn, 0.98)])
def test_rendered_scenes_score_full(side, wear, least):
    images = [render_scene(prompt.scene, side, side) for prompt in PROMPTS]

    scores = score_images(map(wear, images) if wear else images, CAPTIONS)
    assert len(scores.segments().claims) > 80
    assert scores.summary()["segment"] >= least
    assert scores.by_attribute()["relation"][0] >= (1.0 if wear is None else 0.9)


def test_large_objects_score_full_in_tiny_images():
    prompts = scene_prompts(60, "list", segments=[1, 2, 3, 4], style=SceneStyle(1.6))
    objects = [read_scene(render_scene(prompt.scene, 32, 32), 1.6) for prompt in prompts]
    scores = score_objects(objects, [prompt.caption for prompt in prompts]).summary()
    assert min(scores[name] for name in ("colour", "shape", "size", "texture")) >= 0.995


def test_other_aspects_score_full_too():
    prompts = scene_prompts(6, aspect=1.6)
    scores = score_images(
        [render_scene(prompt.scene, 80, 128) for prompt in prompts], [prompt.caption for prompt in prompts]
    )
    assert scores.summary()["segment"] == 1.0


def test_shuffled_captions_score_at_chance():
    images = [render_scene(prompt.scene, 64, 64) for prompt in PROMPTS]
    shuffled = score_images(images, CAPTIONS[1:] + CAPTIONS[:1]).summary()
    chance = chance_level([true_objects(prompt.scene) for prompt in PROMPTS], CAPTIONS)
    assert chance["segment"] < 0.05
    assert 0.1 < chance["colour"] < 0.3
    for name in ("colour", "shape", "size", "texture", "segment"):
        assert abs(shuffled[name] - chance[name]) < 0.12, name


def test_images_without_objects_score_nothing():
    random = np.random.default_rng(0)
    for images in (
        np.full((4, 64, 64, 3), 128, np.uint8),
        random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8),
    ):
        assert score_images(images, CAPTIONS[:4]).summary()["segment"] < 0.05


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CAPTION_KINDS), st.data())
def test_one_wrong_attribute_lowers_its_score_alone(index, kind, data):
    scene = sample_scene(11, index)
    caption = caption_scene(scene, kind, 11, index)
    number = data.draw(st.integers(0, len(scene.objects) - 1))
    item = scene.objects[number]
    name = data.draw(st.sampled_from([name for name in VALUES if name in scene.segments[item.group].stated]))
    value = data.draw(st.sampled_from([value for value in VALUES[name] if value != getattr(item, name)]))

    changed = true_objects(change_object(scene, number, **{name: value}))
    wrong = [claim for claim in judge_caption(0, changed, caption) if not claim.correct]
    assert all(claim.correct for claim in judge_caption(0, true_objects(scene), caption))
    position = caption.segments.index(scene.segments[item.group])

    assert [(claim.attribute, claim.position) for claim in wrong] == [(name, position)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_a_wrong_count_lowers_the_count_alone(index, data):
    scene = sample_scene(12, index)
    several = [number for number, item in enumerate(scene.objects) if scene.segments[item.group].count > 1]
    assume(several)
    caption = caption_scene(scene, "sentence", 12, index)
    number = data.draw(st.sampled_from(several))
    detected = true_objects(scene)
    changed = (
        [*detected, detected[number]]
        if data.draw(st.booleans())
        else detected[:number] + detected[number + 1 :]
    )
    wrong = [claim for claim in judge_caption(0, changed, caption) if not claim.correct]
    position = caption.segments.index(scene.segments[scene.objects[number].group])

    assert [(claim.attribute, claim.position) for claim in wrong] == [("count", position)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_wrong_places_lower_relations_alone(index):
    scene = sample_scene(13, index)
    caption = caption_scene(scene, "paragraph", 13, index)
    mirrored = [replace(item, x=-item.x, y=-item.y) for item in true_objects(scene)]
    wrong = [claim for claim in judge_caption(0, mirrored, caption) if not claim.correct]
    assert [claim.attribute for claim in wrong] == ["relation"] * len(caption.relations)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(VALUES)), st.data())
def test_one_wrong_attribute_is_seen_in_the_image(index, name, data):
    scene = sample_scene(14, index)
    number = data.draw(st.integers(0, len(scene.objects) - 1))
    item = scene.objects[number]
    assume(name in scene.segments[item.group].stated)
    value = data.draw(st.sampled_from([value for value in VALUES[name] if value != getattr(item, name)]))
    caption = caption_scene(scene, "list", 14, index)
    image = render_scene(change_object(scene, number, **{name: value}), 128, 128)

    wrong = [claim.attribute for claim in score_images([image], [caption]).claims if not claim.correct]
    assert wrong == [name]


def test_tables_count_what_was_claimed():
    scores = score_objects([true_objects(prompt.scene) for prompt in PROMPTS], CAPTIONS)
    number = sum(len(caption.segments) for caption in CAPTIONS)
    assert sum(count for _, count in scores.by_position().values()) == number
    assert sum(count for _, count in scores.by_length().values()) == number
    assert scores.by_attribute()["colour"] == (1.0, number)
    assert set(scores.summary().values()) == {1.0}
