"""The tastes of the benchmark: the exact reader finds them in rendered scenes, and hardly in others'."""

import json

import numpy as np
import pytest

from benchmarks import tastes
from benchmarks.tastes import (
    NEW_USERS,
    USERS,
    Taste,
    base_stage,
    likes,
    scene_of,
    show,
    users_stage,
    write_dataset,
    write_images,
)
from data_prep.config import load_dataset
from data_prep.scenes.grammar import TONES, Ground
from data_prep.scenes.rendering import render_scene
from pipeline.following.reading import read_scene
from pipeline.following.scoring import prompt_following, score_objects
from pipeline.stage.config import dump_stage, load_stage


def test_tastes_are_different_and_there_are_enough():
    known = tastes.tastes()
    assert len(known) == len(set(known)) >= USERS + NEW_USERS
    assert Taste() not in known


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
    assert 0.05 < rate < 0.35
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
    for name, named in (("base", False), ("users", True)):
        write_images(tmp_path / name, known, 3, 32, 1.6, 5, named)
        rows = [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        names = ["user 00"] * 3 + ["user 01"] * 3
        assert [row.get("user") for row in rows] == (names if named else [None] * 6)
        assert all((tmp_path / name / row["file_name"]).exists() for row in rows)

        write_dataset(tmp_path / f"{name}.yaml", tmp_path / name, 32, named)
        dataset = load_dataset(tmp_path / f"{name}.yaml", [])
        assert (dataset.name, dataset.users.column) == (name, "user" if named else "")
        assert [entry.name for entry in dataset.text] == ["smollm2"]

    base = base_stage(tmp_path, 640)
    assert (base.run, base.samples, base.data.dataset) == (tmp_path / "runs" / "base", 640, "base")
    base.run.mkdir(parents=True)
    (base.run / "stage.yaml").write_text(dump_stage(base))
    for row in tastes.ROWS:
        (tmp_path / "row.yaml").write_text(dump_stage(users_stage(tmp_path, base.run, row, 2000, USERS)))
        made = load_stage(str(tmp_path / "row.yaml"))
        assert (made.freeze, made.start_from, made.users.count) == ("base", str(base.run), USERS)
        assert (made.data.dataset, made.run.parent) == ("users", base.run.parent)
        assert {key: getattr(made.users, key) for key in tastes.ROWS[row]} == tastes.ROWS[row]


def test_the_table_has_a_row_for_each():
    text = show({"base": {"preference": 8.0, "following": 70.0}})
    assert "| base | 8.0 | 70.0 |" in text
