"""The tastes of the benchmark: the exact reader finds them in rendered scenes, and hardly in others'."""

import json

import numpy as np
import pytest
import yaml

from benchmarks import tastes
from benchmarks.tastes import (
    NEW_USERS,
    USERS,
    Taste,
    likes,
    scene_of,
    show,
    write_dataset,
    write_images,
    write_stage,
)
from data_prep.config import load_dataset
from data_prep.scenes.grammar import TONES, Ground
from data_prep.scenes.rendering import render_scene
from pipeline.following.reading import read_scene
from pipeline.following.scoring import prompt_following, score_objects
from pipeline.stage.config import StageConfig, dump_stage, load_stage


def test_tastes_are_different_and_there_are_enough():
    known = tastes.tastes()
    assert len(known) == len(set(known)) >= USERS + NEW_USERS
    assert all(sum(value is not None for value in vars(taste).values()) >= 2 for taste in known)


@pytest.mark.parametrize(("side", "scale"), [(32, 1.6), (64, 1.0), (128, 1.0)])
def test_a_users_images_are_liked_and_follow_their_captions(side, scale):
    liked, objects, captions = [], [], []
    for number, taste in enumerate(tastes.tastes()[:USERS:3]):
        scene, caption = scene_of(taste, 5, number, scale)
        image = render_scene(scene, side, side)
        liked.append(likes(taste, image, scale))
        objects.append(read_scene(image, scale))
        captions.append(caption)
        words = caption.text
        assert not any(
            word in words for word in ("striped", "dotted", "checkered", "small", "large", "white")
        )
    assert np.mean(liked) > 0.9
    assert prompt_following(score_objects(objects, captions).summary()) > 0.9


def test_images_of_nobody_are_liked_by_chance_and_noise_never():
    known = tastes.tastes()[:USERS]
    images = [render_scene(scene_of(Taste(), 6, number)[0], 64, 64) for number in range(12)]
    rate = np.mean([likes(taste, image) for taste in known for image in images])
    assert 0.02 < rate < 0.25
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), 128, np.uint8)
    assert not any(likes(taste, image) for taste in known for image in (noise, flat))


@pytest.mark.parametrize("tone", TONES)
def test_the_ground_is_read(tone):
    for number in range(4):
        scene, _ = scene_of(Taste(tone), 7, number)
        assert scene.ground == Ground(tone, "plain")
        assert tastes.tone_of(render_scene(scene, 64, 64)) == tone


def test_what_is_written_is_a_dataset_and_a_stage_of_this_project(tmp_path):
    known = tastes.tastes()[:2]
    write_images(tmp_path / "raw", known, 3, 64)
    rows = [json.loads(line) for line in (tmp_path / "raw/metadata.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == ["user 00"] * 3 + ["user 01"] * 3
    assert all((tmp_path / "raw" / row["file_name"]).exists() for row in rows)

    own = {"latents": [{"name": "latents", "vae": "vae"}], "text": [{"name": "tiny", "llm": "llm"}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "store": "store", **own}))
    write_dataset(tmp_path / "tastes.yaml", tmp_path / "own.yaml", tmp_path / "raw", 64)
    dataset = load_dataset(tmp_path / "tastes.yaml", [])
    assert dataset.users.column == "user"
    assert [entry.name for entry in dataset.text] == ["tiny"]

    run = tmp_path / "run"
    run.mkdir()
    stage = StageConfig(name="run")
    stage.fusion.families = ["tiny"]
    (run / "stage.yaml").write_text(dump_stage(stage))
    for row in tastes.ROWS:
        write_stage(tmp_path / "row.yaml", run, row, 2000, USERS)
        made = load_stage(str(tmp_path / "row.yaml"))
        assert (made.freeze, made.start_from, made.users.count) == ("base", str(run), USERS)
        assert {key: getattr(made.users, key) for key in tastes.ROWS[row]} == tastes.ROWS[row]


def test_the_table_has_a_row_for_each():
    text = show({"base": {"preference": 8.0, "following": 70.0}})
    assert "| base | 8.0 | 70.0 |" in text
