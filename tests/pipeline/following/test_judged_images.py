"""The figure of judged images: every claim of a caption once, marked as the scorer judges it."""

import numpy as np
from PIL import Image

from data_prep.scenes.captions import scene_prompts
from data_prep.scenes.rendering import render_scene
from pipeline.following.judged_images import RIGHT, WRONG, claim_lines, save_judged_images
from pipeline.following.scoring import judge_caption
from tests.helpers.scenes import change_object, true_objects

PROMPTS = scene_prompts(40, "paragraph")


def test_every_claim_is_there_once_and_says_its_value():
    for prompt in PROMPTS:
        caption = prompt.caption
        claims = judge_caption(0, true_objects(prompt.scene), caption)
        lines = claim_lines(caption, claims)
        assert sum(map(len, lines)) == len(claims)
        assert len(lines) == len(caption.segments) + len(caption.relations)
        for segment, line in zip(caption.segments, lines, strict=False):
            words = [words for words, _ in line]
            assert words[: len(segment.stated)] == list(segment.stated.values())
            assert words[len(segment.stated) :] == ([f"{segment.count} objects"] if segment.count > 1 else [])
    assert any(prompt.caption.relations for prompt in PROMPTS)


def test_one_wrong_color_is_the_one_wrong_mark():
    (prompt,) = scene_prompts(1, "list", segments=[2])
    other = "red" if prompt.scene.objects[0].colour != "red" else "blue"
    changed = change_object(prompt.scene, 0, colour=other)
    lines = claim_lines(prompt.caption, judge_caption(0, true_objects(changed), prompt.caption))
    wrong = [words for line in lines for words, correct in line if not correct]
    assert wrong == [prompt.scene.objects[0].colour]


def test_marks_have_their_colors(tmp_path):
    (prompt,) = scene_prompts(1, "list", segments=[2])
    pixels = {}
    for name, scene in (("right", prompt.scene), ("wrong", change_object(prompt.scene, 0, shape="heart"))):
        save_judged_images([render_scene(scene, 64, 64)], [prompt.caption], tmp_path / f"{name}.png")
        figure = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        # the lines of text alone, below the image
        pixels[name] = {tuple(pixel) for pixel in figure[300:].reshape(-1, 3).tolist()}
    right, wrong = (tuple(bytes.fromhex(color[1:])) for color in (RIGHT, WRONG))
    assert right in pixels["right"]
    assert wrong not in pixels["right"]
    assert {right, wrong} <= pixels["wrong"]
