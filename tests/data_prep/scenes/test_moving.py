"""Moving scenes: the grammar, their clips and captions, and the source."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import BucketConfig, ClipsConfig, DatasetConfig, ScenesConfig, SourceConfig
from data_prep.dataset.schema import Bucket
from data_prep.pairs.pairs import read_clip
from data_prep.scenes.grammar import COLORS, COMBINATIONS, MIN_GAP, SHAPES, SceneStyle, plane_sides
from data_prep.scenes.moving import (
    MOTIONS,
    MOVING_CAPTION_KINDS,
    caption_moving_scene,
    combination_of,
    moving_prompts,
    render_moving_scene,
    sample_moving_scene,
)
from data_prep.sources.moving_scenes import MovingSceneKey
from model.common.errors import UserError
from tests.helpers.raw_material import all_pairs, prepare, reasons_of

scenes = st.builds(
    sample_moving_scene,
    st.integers(0, 99),
    st.integers(0, 9999),
    st.sampled_from([0.5, 0.75, 1.0, 1.6]),
    st.builds(SceneStyle, st.sampled_from([1.0, 1.6])),
)


@given(scenes)
@settings(max_examples=150, deadline=None)
def test_objects_stay_inside_and_apart_and_move_as_stated(scene):
    width, height = plane_sides(scene.aspect)
    assert any(item.motion != "still" for item in scene.segments)
    assert len({item.segment.colour for item in scene.segments}) == len(scene.segments) == len(scene.objects)
    assert len({item.segment.shape for item in scene.segments}) == len(scene.segments)

    for number, (item, stated) in enumerate(zip(scene.objects, scene.segments, strict=True)):
        left, top, right, bottom = item.box
        assert min(left, top, width - right, height - bottom) >= 0
        (x0, y0, first), (x1, y1, last) = item.start, item.end
        moved = {
            "left": x1 < x0 and y0 == y1 and first == last,
            "right": x1 > x0 and y0 == y1 and first == last,
            "up": y1 < y0 and x0 == x1 and first == last,
            "down": y1 > y0 and x0 == x1 and first == last,
            "growing": first < last and (x0, y0) == (x1, y1),
            "shrinking": first > last and (x0, y0) == (x1, y1),
            "still": item.start == item.end,
        }
        assert [name for name in MOTIONS if moved[name]] == [stated.motion]
        for other in scene.objects[:number]:
            left2, top2, right2, bottom2 = other.box
            assert max(left - right2, left2 - right, top - bottom2, top2 - bottom) >= MIN_GAP


def test_a_scene_is_the_same_at_any_length():
    """The first and the last frame do not depend on the number of frames: motion is over the whole clip."""
    scene = sample_moving_scene(3, 4, 1.0)
    short, long = (render_moving_scene(scene, frames, 48, 48) for frames in (5, 17))
    assert np.array_equal(short[[0, 2, 4]], long[[0, 8, 16]])
    assert not np.array_equal(short[0], short[4])


def test_captions_name_each_object_once_with_its_motion():
    verbs = {name: name for name in ("left", "right", "up", "down")}
    verbs |= {"growing": "grows", "shrinking": "shrinks", "still": "stays still"}
    texts = set()
    for prompt in moving_prompts(60):
        caption, scene = prompt.caption, prompt.scene
        assert sorted(map(repr, caption.segments)) == sorted(map(repr, scene.segments))
        texts.add(caption.text)
        if caption.kind == "zh":
            continue
        for item in caption.segments:
            assert len(re.findall(rf"\b{item.segment.colour}\b", caption.text.lower())) == 1
            assert verbs[item.motion] in caption.text
        slow = sum(item.speed == "slow" for item in caption.segments)
        assert caption.text.count("slowly") == slow
    assert len(texts) > 55
    scene = sample_moving_scene(0, 1, 1.0)
    for kind in MOVING_CAPTION_KINDS:
        assert caption_moving_scene(scene, kind, 0, 1) == caption_moving_scene(scene, kind, 0, 1)


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_plain_scenes_state_color_shape_and_motion_alone(seed, index, objects):
    scene = sample_moving_scene(seed, index, 1.0, SceneStyle(1.0, True, objects))
    assert 1 <= len(scene.objects) <= objects
    for segment in scene.segments:
        assert (segment.segment.size, segment.segment.texture, segment.speed) == (None, None, None)
    text = caption_moving_scene(scene, "list", seed, index).text
    assert not re.search("plain|small|large|slowly|quickly|striped|dotted|checkered", text)


def test_without_one_combination_all_pairs_of_attributes_are_left():
    style, pairs = SceneStyle(1.6, True, 1), [set() for _ in range(COMBINATIONS)]
    for index in range(6000):
        scene = sample_moving_scene(0, index, 1.0, style)
        item = scene.segments[0]
        values = (item.segment.colour, item.segment.shape, item.motion)
        pairs[combination_of(scene)] |= set(itertools.combinations(values, 2))
    # "still" is never the motion of a single object.
    colors, shapes, motions = len(COLORS), len(SHAPES), len(MOTIONS) - 1
    seen = [
        len(set.union(*(found for number, found in enumerate(pairs) if number != left))) for left in (0, 5)
    ]
    assert seen == [colors * shapes + colors * motions + shapes * motions] * 2
    prompts = moving_prompts(20, "list", style=style, combination=3)
    assert {combination_of(prompt.scene) for prompt in prompts} == {3}


def config_of_scenes(tmp_path, **changes):
    scenes = ScenesConfig(count=10, seed=5, file_rows=4, scale=1.6)
    source = SourceConfig(kind="moving_scenes", scenes=scenes)
    defaults = {
        "name": "moving",
        "store": str(tmp_path / "store"),
        "sources": [source],
        "caption_kinds": list(MOVING_CAPTION_KINDS),
        "buckets": BucketConfig(resolution=32, max_aspect=2.0, step=16),
        "clips": ClipsConfig(frames=[5, 9], fps=12.0, format="webp"),
        "part_rows": 4,
        "workers": 0,
    }
    return DatasetConfig(**{**defaults, **changes})


def test_pairs_hold_every_scene_as_it_was_drawn(tmp_path):
    dataset = prepare(config_of_scenes(tmp_path))
    assert reasons_of(dataset) == {}
    pairs = all_pairs(dataset)
    assert len({pair.key for pair in pairs}) == 10
    for pair in pairs:
        key = MovingSceneKey.parse(pair.key)
        assert str(key) == pair.key
        assert Bucket(pair.height, pair.width, pair.frames) == key.bucket
        assert np.array_equal(read_clip(pair), key.render())
        assert pair.captions == [(caption.kind, caption.text) for caption in key.captions]
        assert pair.fps == pytest.approx(12, rel=0.01)
    assert {pair.frames for pair in pairs} == {5, 9}


def test_moving_scenes_need_settings_of_clips(tmp_path):
    with pytest.raises(UserError, match=r"sources\[0\]: moving scenes are clips: set `clips`"):
        config_of_scenes(tmp_path, clips=None)
    with pytest.raises(ValueError, match="not the key of a moving scene"):
        MovingSceneKey.parse("moving-1-2-64x64")
