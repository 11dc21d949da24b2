"""`pipeline.follow` as a user types it, and what the truth and a model that cannot have learned score in
it."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.scenes.moving import combination_of
from data_prep.scenes.rendering import render_scene
from model.scorers.blip_vqa import BlipVQA
from model.scorers.files import find_scorer
from pipeline import follow, sample
from pipeline.follow import make_prompts
from pipeline.following.natural_prompts import natural_prompts
from tests.helpers import tiny_scorers
from tests.helpers.fake_bench import Judges, Oracle
from tests.helpers.tiny_sampler import CPU, make_sampler

LONGEST = 400
"""Letters of a prompt of eight segments."""


class Folder:
    """Commands in a folder; `out` is what `pipeline.follow` works in."""

    def __init__(self, folder, monkeypatch):
        self.out, self.monkeypatch = folder / "follow", monkeypatch
        for name in ("RANK", "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)

    def type(self, program, *words):
        self.monkeypatch.setattr("sys.argv", list(map(str, [program.__name__, *words])))
        program.main()

    def draw(self, sampler, *words):
        self.monkeypatch.setattr(sample, "load_source", lambda *_: sampler)
        self.type(
            sample,
            "run",
            "--prompts",
            self.out / "prompts.txt",
            "--out",
            self.out / "pictures",
            "--steps",
            2,
            *words,
        )

    def draw_truth(self, images=1):
        (self.out / "pictures").mkdir()
        for number, prompt in enumerate(self.prompts()):
            for image in range(images):
                path = self.out / "pictures" / f"{number:05d}_{image:02d}.png"
                Image.fromarray(render_scene(prompt.scene, 64, 64)).save(path)

    def prompts(self):
        return make_prompts(json.loads((self.out / "prompts.json").read_text()))

    def scores(self):
        return json.loads((self.out / "scores.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return Folder(tmp_path, monkeypatch)


def refused(capsys, says, type, *words):
    with pytest.raises(SystemExit) as exit:
        type(*words)
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1)
    assert says in error


def test_the_truth_of_scenes_scores_everything(folder, capsys):
    folder.type(follow, "write", folder.out, "--count", 14)
    assert (folder.out / "prompts.txt").read_text().splitlines() == [
        prompt.caption.text for prompt in folder.prompts()
    ]
    folder.draw_truth(images=2)
    folder.type(follow, "score", folder.out)
    result = folder.scores()
    assert set(result["summary"].values()) == {1.0}
    assert 0 < result["chance"]["segment"] < 0.1
    bias = result["positional_bias"]
    assert [point["mean"] for point in bias["curve"]] == [1.0] * 8
    assert [bias[name]["mean"] for name in ("gap", "slope")] == pytest.approx([0, 0], abs=1e-12)
    assert Image.open(folder.out / "positional_bias.png").width > 100
    assert Image.open(folder.out / "judged.png").width > 1000
    assert "last minus first segment +0.0 [+0.0, +0.0] points" in capsys.readouterr().out


@pytest.mark.parametrize("combination", [0, 5])
def test_prompts_of_one_combination_are_written(folder, combination):
    words = ("--prompts", "moving", "--segments", 1, "--plain", "--objects", 1, "--scale", 1.6)
    folder.type(follow, "write", folder.out, "--count", 8, *words, "--combination", combination)
    prompts = folder.prompts()
    assert {combination_of(prompt.scene) for prompt in prompts} == {combination}
    texts = [prompt.caption.text for prompt in prompts]
    assert (folder.out / "prompts.txt").read_text().splitlines() == texts


def test_random_weights_score_at_chance_in_scenes(folder):
    """Chance is what the same pictures score on other prompts' captions."""
    folder.type(follow, "write", folder.out, "--count", 21, "--prompts", "scenes")
    folder.draw(make_sampler(longest=LONGEST), "--size", "48x48")
    folder.type(follow, "score", folder.out)
    result = folder.scores()
    assert result["summary"].keys() == result["chance"].keys()
    assert result["summary"] == pytest.approx(result["chance"], abs=0.12)
    bias, level = result["positional_bias"], np.mean([score for each in result["segments"] for score in each])
    assert all(point["low"] <= level <= point["high"] for point in bias["curve"])
    assert bias["gap"]["low"] <= 0 <= bias["gap"]["high"]


@pytest.mark.parametrize("source", ["truth", "random weights"])
def test_natural_prompts_have_a_level_of_truth_and_of_chance(folder, source):
    folder.type(follow, "write", folder.out, "--prompts", "natural", "--count", 56)
    world = {prompt.text.lower(): None for prompt in folder.prompts()}
    oracle = Oracle([prompt.text for prompt in folder.prompts()])
    folder.draw(oracle if source == "truth" else make_sampler(longest=LONGEST))
    result = follow.score_folder(folder.out, Judges(world))
    bias = result["positional_bias"]
    if source == "truth":
        assert result["summary"] == {"segment": 1.0}
        assert {point.mean for point in bias.curve} == {1.0}
    else:
        assert result["summary"]["segment"] == pytest.approx(0.5, abs=0.06)
        assert all(point.low - 0.1 <= 0.5 <= point.high + 0.1 for point in bias.curve)
        assert bias.gap.low <= 0 <= bias.gap.high


class Early:
    """Sees what is said first and nothing else."""

    identity = {"name": "early"}  # noqa: RUF012

    def yes(self, image, questions):
        assert all(question.endswith("?") for question in questions)
        return [1.0, *[0.0] * (len(questions) - 1)]


def test_a_model_that_draws_what_is_said_first_has_a_falling_curve(folder):
    folder.type(follow, "write", folder.out, "--prompts", "natural", "--count", 14)
    folder.draw(make_sampler(longest=LONGEST))
    bias = follow.score_folder(folder.out, Early())["positional_bias"]
    assert bias.gap.mean == -1.0
    assert bias.slope.high < 0


def test_blip_judges_natural_prompts(folder, tmp_path, capsys):
    (tmp_path / "blip").mkdir()
    blip = str(tiny_scorers.blip(tmp_path / "blip"))
    folder.type(follow, "write", folder.out, "--prompts", "natural", "--count", 7, "--seed", 5)
    folder.draw(make_sampler(longest=LONGEST), "--images", 2)
    refused(capsys, "give --vqa", folder.type, follow, "score", folder.out)
    folder.type(follow, "score", folder.out, "--vqa", blip)
    result = folder.scores()
    vqa = result["vqa"]
    assert (vqa["name"], vqa["template"], len(vqa["revision"]) > 20) == ("blip", "{segment}?", True)
    prompts, model = natural_prompts(7, 5), BlipVQA(find_scorer(blip, "--vqa"), CPU)
    for number in (0, 6):
        answers = []
        for image in range(2):
            with Image.open(folder.out / "pictures" / f"{number:05d}_{image:02d}.png") as picture:
                answers.append(
                    model.yes(picture.convert("RGB"), [f"{segment}?" for segment in prompts[number].segments])
                )
        assert result["segments"][number] == pytest.approx(np.mean(answers, axis=0))
    assert result["summary"]["segment"] == pytest.approx(
        np.mean([score for each in result["segments"] for score in each])
    )
    assert len({score for each in result["segments"] for score in each}) == sum(range(2, 9)), (
        "each segment is asked about"
    )


def test_wrong_input_is_one_line(folder, tmp_path, capsys):
    refused(capsys, "2 to 8", folder.type, follow, "write", folder.out, "--segments", 9)
    refused(capsys, "2 to 8", folder.type, follow, "write", folder.out, "--segments", 1)
    refused(capsys, "pipeline.follow write", folder.type, follow, "score", folder.out)
    folder.type(follow, "write", folder.out, "--count", 14)
    refused(capsys, "0 images for 14", folder.type, follow, "score", folder.out)
    folder.draw_truth()
    (folder.out / "pictures" / "00003_00.png").unlink()
    refused(capsys, "13 images for 14", folder.type, follow, "score", folder.out)
    refused(capsys, "seed differ", folder.type, follow, "write", folder.out, "--count", 14, "--seed", 1)
    refused(capsys, "no safetensors", folder.type, follow, "score", folder.out, "--vqa", tmp_path)


@pytest.mark.parametrize("aspect", ["1e16", "0", "nan"])
def test_an_endless_strip_is_refused(folder, aspect, capsys):
    with pytest.raises(SystemExit) as ended:
        folder.type(follow, "write", folder.out, "--aspect", aspect)
    assert ended.value.code == 2
    assert "0.01 to 100" in capsys.readouterr().err
