"""The ends of the demos on known images: training images are recognized, rendered scenes are right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from PIL import Image

from data_prep.config import load_dataset
from data_prep.pairs.pairs import Pair
from data_prep.scenes.captions import scene_prompts
from data_prep.scenes.grammar import combination_of
from data_prep.scenes.rendering import render_scene
from pipeline.demo import DATASETS
from pipeline.demonstration import emoji, scenes
from pipeline.demonstration.emoji import EmojiEnding
from pipeline.demonstration.ending import MAX_SHOWN
from pipeline.demonstration.scenes import UNSEEN, ScenesEnding
from pipeline.follow import main as follow
from pipeline.stage.config import load_stage
from tests.helpers.raw_material import png

DATASET = SimpleNamespace(latents=[SimpleNamespace(vae="its/folder")])
PAIRS = [Pair(n, str(n), png(n, 16, 16), [("original", f"thing {n}")], 16, 16) for n in range(60)]


class PooledPixels:
    """A latent space of pixels' means over squares of four."""

    def encode(self, pixels):
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        return F.avg_pool2d(pixels, 4), None


def stage_in(folder, name):
    return load_stage(name, [f"runs={folder}"])


def write_index(folder, prompts):
    records = [{"file": f"{number:05d}_00.png", "prompt": prompt} for number, prompt in enumerate(prompts)]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")


@pytest.fixture
def emoji_demo(tmp_path, monkeypatch):
    """An ending whose "generated" image of each prompt is the training image a given number of rows on."""
    shift = 0

    def sample(command, run, *options):
        assert command == "pipeline.sample"
        prompts = Path(options[options.index("--prompts") + 1]).read_text().splitlines()
        drawn = ending.drawn
        drawn.mkdir()
        for number, prompt in enumerate(prompts):
            image = PAIRS[(int(prompt.split()[1]) + shift) % len(PAIRS)].image
            (drawn / f"{number:05d}_00.png").write_bytes(image)
        write_index(drawn, prompts)

    def draw(rows_on):
        nonlocal shift
        shift = rows_on
        ending.sample_images()
        return ending.measure()

    monkeypatch.setattr(emoji, "read_all_pairs", lambda stage: PAIRS)
    monkeypatch.setattr(emoji, "load_latent_space", lambda *_: PooledPixels())
    monkeypatch.setattr("pipeline.demonstration.ending.run", sample)
    stage = stage_in(tmp_path, "demo")
    stage.run.mkdir(parents=True)
    ending = EmojiEnding(stage, DATASET, 30)
    return ending, draw


def test_training_images_are_recognized(emoji_demo):
    ending, draw = emoji_demo
    measured = draw(0)
    assert [measured[name]["share"] for name in ("pixels", "latents")] == [1.0, 1.0]
    assert (measured["pixels"]["images"], measured["pixels"]["references"]) == (30, 60)
    labels = [tile["label"] for tile in ending.tiles(measured)]
    assert labels[0].startswith("recognized by pixels among 60 training images (95 %: ")
    assert labels[0].endswith("of 30, chance 1.67%)")
    assert [tile["value"] for tile in ending.tiles(measured)] == ["100.0%", "100.0%"]


def test_images_of_other_captions_are_not_recognized(emoji_demo):
    _, draw = emoji_demo
    measured = draw(1)
    assert [measured[name]["share"] for name in ("pixels", "latents")] == [0.0, 0.0]


def test_the_report_shows_each_image_next_to_its_own_training_image(emoji_demo):
    ending, draw = emoji_demo
    draw(0)
    pictures = ending.shown_images()
    assert len(pictures) == MAX_SHOWN
    for picture in pictures:
        row = int(picture["caption"].split()[1])
        assert (ending.stage.run / picture["real"]).read_bytes() == PAIRS[row].image
        assert (ending.stage.run / picture["drawn"]).read_bytes() == PAIRS[row].image
    assert len({picture["caption"] for picture in pictures}) == MAX_SHOWN


def test_more_images_than_pairs_are_one_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "read_all_pairs", lambda stage: PAIRS[:5])
    assert EmojiEnding(stage_in(tmp_path, "demo"), DATASET, 30).chosen == [0, 1, 2, 3, 4]


def test_rendered_scenes_are_right_and_their_claims_are_marked(tmp_path, monkeypatch):
    shipped = load_dataset(DATASETS / "demo_scenes.yaml", [])
    ending = ScenesEnding(stage_in(tmp_path, "demo_scenes"), shipped, 6)
    assert "combination != 0" in {rule.value for rule in shipped.filters}

    def do(command, *arguments):
        if command == "pipeline.sample":
            ending.drawn.mkdir()
            style = shipped.sources[0].scenes.style
            prompts = scene_prompts(6, "list", segments=[2], style=style, combination=UNSEEN)
            assert {combination_of(prompt.scene) for prompt in prompts} == {0}
            for number, prompt in enumerate(prompts):
                image = Image.fromarray(render_scene(prompt.scene, 32, 32))
                image.save(ending.drawn / f"{number:05d}_00.png")
            write_index(ending.drawn, [prompt.caption.text for prompt in prompts])
        else:
            assert command == "pipeline.follow"
            monkeypatch.setattr(sys, "argv", ["follow", *arguments])
            follow()

    monkeypatch.setattr(scenes, "run", do)
    monkeypatch.setattr("pipeline.demonstration.ending.run", do)
    ending.sample_images()
    measured = ending.measure()
    assert measured["right"]["colour"] > 0.9
    assert measured["right"]["shape"] > 0.9
    assert measured["chance"]["colour"] < 0.6

    tiles = {tile["label"].split(" right")[0]: tile for tile in ending.tiles(measured)}
    assert {"colors", "shapes", "whole objects", "whole prompts"} <= set(tiles)
    assert "in 6 new prompts (chance " in tiles["colors"]["label"]
    pictures = ending.shown_images()
    assert len(pictures) == 6
    assert all("✓ color 1" in picture["marks"] for picture in pictures)
    assert "real" not in pictures[0]
