"""Captions of the contrast set: they say what is in the scene, and only that."""

from hypothesis import given
from hypothesis import strategies as st

from data_prep.scenes.captions import caption_scene
from data_prep.scenes.contrast import CONTRAST_KINDS, caption_contrast
from data_prep.scenes.grammar import COLORS, SceneStyle, sample_scene
from pipeline.following.scoring import judge_caption
from tests.helpers.scenes import true_objects

PLAIN = SceneStyle(1.6, plain=True, objects=4)
SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(0, 1000), st.sampled_from(CONTRAST_KINDS), st.booleans())
def test_every_claim_is_true_of_the_scene(seed, index, kind, plain):
    scene = sample_scene(seed, index, style=PLAIN) if plain else sample_scene(seed, index)
    caption = caption_contrast(scene, kind, seed, index)
    assert all(claim.correct for claim in judge_caption(0, true_objects(scene), caption))
    assert sorted(map(str, caption.segments)) == sorted(map(str, scene.segments))
    assert caption == caption_contrast(scene, kind, seed, index)


@given(SEEDS, st.integers(2, 4))
def test_what_is_absent_has_a_color_and_a_shape_that_are_named(seed, segments):
    scene = sample_scene(seed, 0, segments=segments, style=PLAIN)
    caption = caption_contrast(scene, "negation", seed, 0)
    (absent,) = caption.absent
    assert absent.colour in {segment.colour for segment in scene.segments}
    assert absent.shape in {segment.shape for segment in scene.segments}
    assert caption.text.endswith(f"but no {absent.colour} {absent.shape}.")


@given(SEEDS, st.integers(2, 4))
def test_colors_are_in_another_sentence_than_the_objects(seed, segments):
    scene = sample_scene(seed, 0, segments=segments, style=PLAIN)
    sentences = caption_contrast(scene, "distant", seed, 0).text.lower().strip(".").split(". ")
    colored = [any(color in sentence.split() for color in COLORS) for sentence in sentences]
    assert sorted(colored) == [False, True]
    words = sentences[colored.index(True)].replace(",", "").split()
    for segment in scene.segments:
        verb = words.index(segment.colour) - 1
        assert words[verb] == "is"
        assert words[verb - 1] == segment.shape


def test_groups_of_one_shape_are_listed():
    scene = next(
        scene
        for scene in (sample_scene(3, index, segments=4) for index in range(1000))
        if len({segment.shape for segment in scene.segments}) < len(scene.segments)
    )
    assert caption_contrast(scene, "distant", 3, 5) == caption_scene(scene, "list", 3, 5)
