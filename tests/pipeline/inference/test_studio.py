"""What the web page draws and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.common.errors import UserError
from pipeline.inference.images import read_settings
from pipeline.inference.studio import (
    NO_INSTRUCTION,
    NOTHING,
    OTHER,
    GenerationRequest,
    InteractiveSampler,
    Limits,
)
from tests.helpers.tiny_sampler import make_sampler, with_head

REQUEST = GenerationRequest("a red cat", "", 16, 24, 2, 3.0, 7, 2, "euler")


@pytest.fixture
def studio(tmp_path):
    return InteractiveSampler({"tiny": make_sampler()}, tmp_path / "web", Limits(side=64, steps=10, images=4))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def test_a_request_gives_pictures_with_their_settings(studio):
    (column,) = studio.generate(REQUEST)
    assert column.maps == []
    assert [read_settings(path)["seed"] for path in column.files] == [7, 8]
    assert all(read_settings(path)["prompt"] == "a red cat" for path in column.files)
    (again,) = studio.generate(replace(REQUEST, images=1))
    assert (pixels(again.files[0]) == pixels(column.files[0])).all()
    assert len(list(studio.out.glob("*.png"))) == 3


def test_the_second_column_differs_in_one_thing(studio):
    assert studio.comparisons == [NOTHING, NO_INSTRUCTION, "without first", "without second"]
    for compare in studio.comparisons[1:]:
        left, right = (
            column.files for column in studio.generate(replace(REQUEST, compare=compare, images=1))
        )
        ours, theirs = read_settings(left[0]), read_settings(right[0])
        assert [key for key in ours if ours[key] != theirs[key]] == [
            "instruction" if compare == NO_INSTRUCTION else "without"
        ]
        assert (pixels(left[0]) != pixels(right[0])).any()


def test_other_weights_can_be_compared(tmp_path):
    studio = InteractiveSampler(
        {str(tmp_path / "one"): make_sampler(), "runs/two": make_sampler()}, tmp_path, Limits()
    )
    left, right = (column.files for column in studio.generate(replace(REQUEST, compare=OTHER)))
    assert [read_settings(path)["source"] for path in (left[0], right[0])] == ["one", "two"]
    assert (pixels(left[0]) == pixels(right[0])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x" * 5000}, "shorten"),
        ({"prompt": "x" * 30}, "longer than"),
        ({"height": 128}, "from 1 to 64"),
        ({"height": 20}, "multiple of 8"),
        ({"steps": 99}, "from 1 to 10"),
        ({"images": 5}, "from 1 to 4"),
        ({"guidance": -1.0}, "0 to 30"),
        ({"seed": -1}, "whole number"),
        ({"seed": None}, "whole number"),
        ({"steps": 2.5}, "whole number"),
        ({"attention": 3}, "attention=3: choose a whole number from 0 to 2"),
        ({"difficulty": 1}, "difficulty=1: give true or false"),
        ({"difficulty": True}, "does not predict that of patches"),
        ({"scheduler": "ddim"}, "take one of"),
        ({"compare": "without third"}, "choose nothing"),
    ],
)
def test_what_is_out_of_bounds_is_refused_and_nothing_is_drawn(studio, change, message):
    with pytest.raises(UserError, match=message):
        studio.generate(replace(REQUEST, **change))
    assert not list(studio.out.glob("*.png"))


def test_attention_is_shown_per_word_in_each_column_and_changes_no_picture(studio):
    plain, _ = studio.generate(replace(REQUEST, compare=NO_INSTRUCTION))
    left, right = studio.generate(replace(REQUEST, compare=NO_INSTRUCTION, attention=2))
    for column in (left, right):
        assert [label.split()[0] for _, label in column.maps] == ["a", "red", "cat"]
        assert all(image.size == (256, 171) for image, _ in column.maps)
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(plain.files, left.files, strict=True))


def test_expected_errors_are_maps_beside_the_words_and_change_no_picture(studio):
    (sampler,) = studio.samplers.values()
    sampler.network = with_head(sampler.network)
    (plain,) = studio.generate(REQUEST)
    (column,) = studio.generate(replace(REQUEST, attention=1, difficulty=True))
    labels = [label for _, label in column.maps]
    assert labels[3:] == ["expected error, t 1.00", "expected error, t 0.50"]
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(plain.files, column.files, strict=True))
