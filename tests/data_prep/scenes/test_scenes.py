import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.config import BucketConfig, DatasetConfig, DedupeConfig, ScenesConfig, SourceConfig
from data_prep.dataset.parts import committed
from data_prep.dataset.schema import PAIRS, Bucket
from data_prep.pairs.pairs import read_pairs, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.scenes.captions import CAPTION_KINDS, adjectives_and_noun, caption_scene, scene_prompts
from data_prep.scenes.grammar import (
    COLORS,
    EXTENTS,
    MAX_OBJECTS,
    MIN_GAP,
    SHAPES,
    Ground,
    SceneStyle,
    combination_of,
    differences,
    sample_scene,
)
from data_prep.scenes.rendering import render_scene
from data_prep.sources.scenes import SceneKey, ScenesSource
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share

SEEDS = st.integers(0, 2**40)
INDEXES = st.integers(0, 2**40)
ASPECTS = st.floats(0.4, 2.5)
STYLES = st.builds(
    SceneStyle, st.sampled_from([0.5, 1.0, 1.6]), st.booleans(), st.none() | st.integers(1, MAX_OBJECTS)
)


@given(STYLES)
def test_a_style_is_read_back_from_its_suffix(style):
    assert SceneStyle.parse(style.suffix) == style
    with pytest.raises(ValueError, match="no style"):
        SceneStyle.parse(style.suffix + "-x")


@settings(max_examples=150, deadline=None)
@given(SEEDS, INDEXES, ASPECTS, STYLES)
def test_a_scene_is_a_function_of_seed_and_index_and_keeps_its_promises(seed, index, aspect, style):
    scene, scale = sample_scene(seed, index, aspect, style=style), style.scale
    assert scene == sample_scene(seed, index, aspect, style=style)
    assert 1 <= len(scene.objects) <= (style.objects or MAX_OBJECTS)
    if style.plain:
        assert {(item.size, item.texture) for item in scene.objects} == {("large", "plain")}
        assert all(set(segment.stated) == {"colour", "shape"} for segment in scene.segments)
        assert scene.ground == Ground("white", "plain")
    assert Counter(item.group for item in scene.objects) == Counter(
        {number: segment.count for number, segment in enumerate(scene.segments)}
    )

    for item in scene.objects:
        half = scale * EXTENTS[item.size] / 2 + MIN_GAP / 2 - 1e-3
        assert half <= item.x <= scene.sides[0] - half
        assert half <= item.y <= scene.sides[1] - half
        assert all(getattr(item, name) == value for name, value in scene.segments[item.group].stated.items())

    for number, a in enumerate(scene.objects):
        for b in scene.objects[:number]:
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - scale * (EXTENTS[a.size] + EXTENTS[b.size]) / 2
            assert apart >= MIN_GAP - 1e-3

    for number, a in enumerate(scene.segments):
        assert all(differences(a, b) >= 2 for b in scene.segments[:number])


@settings(max_examples=100, deadline=None)
@given(SEEDS, INDEXES, st.sampled_from(CAPTION_KINDS))
def test_captions_say_each_segment_once_and_only_true_relations(seed, index, kind):
    scene = sample_scene(seed, index)
    caption = caption_scene(scene, kind, seed, index)
    assert caption == caption_scene(scene, kind, seed, index)
    assert Counter(caption.segments) == Counter(scene.segments)

    single = {
        scene.segments[item.group]: item for item in scene.objects if scene.segments[item.group].count == 1
    }
    for relation in caption.relations:
        a, b = single[caption.segments[relation.subject]], single[caption.segments[relation.other]]
        expected = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        assert expected[relation.direction]

    if kind == "zh":
        assert not any("a" <= letter <= "z" for letter in caption.text)
    elif kind != "paragraph":
        begins = [caption.text.lower().index(adjectives_and_noun(segment)) for segment in caption.segments]
        assert begins == sorted(begins)


def test_the_order_of_mention_is_independent_of_the_position():
    x, y, order = [], [], []
    for prompt in scene_prompts(400, segments=[6]):
        place = {prompt.scene.segments[item.group]: item for item in prompt.scene.objects}
        for number, segment in enumerate(prompt.caption.segments):
            x.append(place[segment].x)
            y.append(place[segment].y)
            order.append(number)
    for axis in (x, y):
        assert abs(np.corrcoef(axis, order)[0, 1]) < 4 / np.sqrt(len(order))


@given(st.integers(0, 1000), st.sampled_from([(64, 64), (48, 80), (131, 97)]))
@settings(max_examples=25, deadline=None)
def test_a_scene_is_the_same_image_at_every_resolution(index, size):
    height, width = size
    scene = sample_scene(1, index, width / height, ground=Ground("black", "plain"))
    small, large = render_scene(scene, height, width), render_scene(scene, 2 * height, 2 * width)
    averaged = large.reshape(height, 2, width, 2, 3).mean((1, 3))
    assert small.shape == (height, width, 3)
    assert abs(small - averaged).mean() < 4


def test_scenes_go_through_the_pipeline_and_their_keys_give_them_back(tmp_path):
    config = DatasetConfig(
        name="scenes",
        store=str(tmp_path),
        sources=[SourceConfig(kind="scenes", scenes=ScenesConfig(count=40, seed=5, file_rows=16))],
        caption_kinds=list(CAPTION_KINDS),
        dedupe=DedupeConfig(),
        buckets=BucketConfig(resolution=64, max_aspect=2.0, step=16),
        image_format="png",
        workers=0,
    )
    dataset = open_store(f"{tmp_path}/scenes", create=True)
    run_plan(config, dataset, Share(0, 1))
    run_pairs(config, dataset, Share(0, 1))

    keys = set()
    for commit in committed(dataset, PAIRS).values():
        for pair in read_pairs(dataset, commit, config.caption_kinds):
            key = SceneKey.parse(pair.key)
            assert (key.bucket.height, key.bucket.width) == (pair.height, pair.width)
            assert dict(pair.captions) == {kind: key.captions[kind].text for kind in CAPTION_KINDS}
            assert decoded(pair.image).tolist() == key.render().tolist()
            keys.add(pair.key)
    assert len(keys) == 40


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_source_reads_and_fetches_the_same_bytes():
    source = ScenesSource(ScenesConfig(count=5, seed=2, file_rows=2), [Bucket(64, 64), Bucket(48, 80)])
    names = source.inventory().names
    assert names == sorted(names)
    rows = [(name, sample) for name in names for sample in source.read(name, [])]
    assert len({sample.key for _, sample in rows}) == 5
    for name, sample in rows:
        assert dict(source.fetch(name, [sample.place])) == {0: sample.image}


def test_keys_and_settings_without_a_scene_are_refused():
    with pytest.raises(ValueError, match="scene-x"):
        SceneKey.parse("scene-x")
    with pytest.raises(UserError, match="count=0"):
        ScenesSource(ScenesConfig(), [Bucket(64, 64)])
    with pytest.raises(UserError, match="go together"):
        DatasetConfig(
            sources=[SourceConfig(kind="folder", path="x", scenes=ScenesConfig(1))],
            caption_kinds=list(CAPTION_KINDS),
        )


def test_without_one_combination_all_colors_and_shapes_are_left():
    style, seen = SceneStyle(1.6, True, 3), set()
    for index in range(2000):
        scene = sample_scene(0, index, style=style)
        if combination_of(scene) != 0:
            seen |= {(segment.colour, segment.shape) for segment in scene.segments}
    assert {color for color, _ in seen} == set(COLORS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert len(seen) == len(COLORS) * len(SHAPES) - len(SHAPES)

    prompts = scene_prompts(20, "list", segments=[3], style=style, combination=0)
    assert len(prompts) == 20
    for prompt in prompts:
        assert {(part.colour, part.shape) for part in prompt.scene.segments} - seen
    with pytest.raises(UserError, match="combination 7: hardly any scene has it: take 0, or fewer segments"):
        scene_prompts(2, "list", segments=[7], style=SceneStyle(0.5, True), combination=7)


def test_plain_scenes_with_room_for_eight_objects_have_seven_groups_at_most():
    style = SceneStyle(0.5, True)
    groups = {len(sample_scene(0, index, segments=8, style=style).segments) for index in range(20)}
    assert groups == {7}
    assert max(len(sample_scene(0, index, style=style).segments) for index in range(400)) <= 7
