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
    follows,
    likes,
    picture_of,
    show,
    users_stage,
    write_dataset,
    write_images,
)
from data_prep.config import load_dataset
from data_prep.scenes.grammar import COLORS, SHAPES, SIZES, TONES, Ground
from data_prep.scenes.rendering import render_scene
from pipeline.stage.config import dump_stage, load_stage


def test_tastes_are_of_four_kinds_and_those_of_new_users_of_each():
    known = tastes.tastes()
    kinds = [taste.fixes for taste in known]
    assert len(known) == USERS + NEW_USERS
    assert {kind: kinds[:USERS].count(kind) for kind in kinds} == dict.fromkeys(kinds, USERS // 4)
    assert sorted(kinds[USERS:]) == sorted(set(kinds))
    for taste in known[USERS:]:
        assert taste.fixes in ("ground", "size") or taste not in known[:USERS]


def test_a_users_images_are_liked_follow_their_captions_and_do_not_state_what_is_liked():
    for number, taste in enumerate(tastes.tastes()):
        pictures = [picture_of(taste, 5 + number, index) for index in range(6)]
        images = [render_scene(picture.scene, 32, 32) for picture in pictures]
        assert all(likes(taste, image) for image in images)
        assert follows(pictures, images) == 1.0
        for picture in pictures:
            words = set(picture.text.lower().replace(".", "").split())
            stated = {"ground": {"ground"}, "shape": {*SHAPES}, "colour": {*COLORS}, "size": {*SIZES}}
            assert not words & stated[taste.fixes]


def test_captions_state_each_attribute_three_times_in_four():
    texts = [picture_of(Taste(), 6, number).text.lower() for number in range(200)]
    for words in (COLORS, SHAPES, SIZES, ("ground",)):
        share = np.mean([any(word in text.replace(".", "").split() for word in words) for text in texts])
        assert 0.65 < share < 0.85


def test_images_of_nobody_are_liked_by_chance_and_noise_never():
    known = tastes.tastes()[:USERS]
    images = [render_scene(picture_of(Taste(), 6, number).scene, 32, 32) for number in range(24)]
    rate = np.mean([likes(taste, image) for taste in known for image in images])
    assert 0.15 < rate < 0.35
    flat = np.full((32, 32, 3), 128, np.uint8)
    assert not any(likes(taste, flat) for taste in known)
    others = [picture_of(Taste(), 7, number) for number in range(24)]
    assert follows(others, images) < 0.5


@pytest.mark.parametrize("tone", TONES)
def test_the_ground_is_read(tone):
    for number in range(4):
        picture = picture_of(Taste(ground=tone), 7, number)
        assert picture.scene.ground == Ground(tone, "plain")
        assert tastes.tone_of(render_scene(picture.scene, 32, 32)) == tone


def test_what_is_written_is_a_dataset_and_a_stage_of_this_project(tmp_path):
    known = tastes.tastes()[:2]
    for name, named in (("base", False), ("users", True)):
        write_images(tmp_path / name, known, 3, 32, 5, named)
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
