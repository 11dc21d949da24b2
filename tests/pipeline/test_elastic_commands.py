"""An elastic run by the commands themselves: previews of each part, sampling, export of a part."""

import json

import numpy as np
import pytest
from PIL import Image

from model.common.errors import UserError
from pipeline import export, sample
from pipeline.reporting.page import build
from pipeline.runtime.run_log import read_events
from pipeline.stage.config import load_run
from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_commands import commands

PARTS = ["depth4_patch2", "depth2_patch2", "depth4_patch4", "depth2_patch4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An elastic run of two steps, with previews."""
    folder = tmp_path_factory.mktemp("trained")
    fake_snapshot.make(folder / "store", {"32x32": [20]}, folder)
    settings = {"samples": 16, "data__validation_parts": 0, "log__validate_every_samples": 0}
    settings |= {"sample__height": 32, "sample__width": 64, "sample__steps": 2, "ema": [0.5]}
    settings |= {"sample__every_samples": 16, "sample__prompts": ["a cat"], "sample__scenes": 4}
    settings |= {"model__depth": 4, "elastic__depths": [4, 2], "elastic__patches": [2, 4]}
    results = on_ranks(2, trainer_tasks.train_and_draw, str(folder / "store"), str(folder), settings)
    assert results[0][0] == 0
    return folder / "small"


@pytest.fixture
def command(monkeypatch):
    """Runs a program as from the shell."""
    return commands(monkeypatch)


def pixels(folder):
    with Image.open(folder / "00000_00.png") as image:
        return np.asarray(image)


@pytest.mark.parametrize("part", [("--depth", 2), ("--depth", 2, "--patch", 4), ()])
def test_an_export_of_a_part_samples_its_images(run, command, tmp_path, part):
    prompt = ("--prompt", "a red cat", "--seed", 3)
    command(export, run, tmp_path / "exported", "--precision", "fp32", *part)
    command(sample, run, *prompt, *part, "--out", tmp_path / "run")
    command(sample, tmp_path / "exported", *prompt, "--out", tmp_path / "export")
    assert (pixels(tmp_path / "run") == pixels(tmp_path / "export")).all()
    texts = [path.read_text() for path in (tmp_path / "exported").rglob("*.json")]
    assert texts
    assert not any("elastic" in text for text in texts)
    record = json.loads((tmp_path / "run" / "index.jsonl").read_text())
    assert {name: record[name] for name in ("depth", "patch") if name in record} == {
        name.removeprefix("--"): value for name, value in zip(part[::2], part[1::2], strict=True)
    }


def test_parts_that_were_not_trained_are_one_line(run, command, tmp_path):
    for program, where in (
        (sample, ("--out", tmp_path, "--prompt", "x")),
        (export, (tmp_path / "exported",)),
    ):
        with pytest.raises(SystemExit) as ended:
            command(program, run, *where, "--depth", 3)
        assert ended.value.code == 2
    assert not (tmp_path / "exported").exists()


def test_previews_are_made_with_every_part(run):
    folders = [run / "grids", *(run / "grids" / part for part in PARTS[1:])]
    assert all(
        [path.name for path in folder.glob("*.png")] == ["samples_000000000016.png"] for folder in folders
    )
    assert load_run(run).elastic.depths == [4, 2]


def test_scenes_are_scored_with_every_part(run):
    names = ["scenes", *(f"scenes_{part}" for part in PARTS[1:])]
    scores = {name: read_events(run, name) for name in names}
    for events in scores.values():
        (event,) = events
        assert event["samples"] == 16
        assert all(0 <= event[name] <= 1 for name in ("segment", "colour", "following", "chance"))
    page = build(run).read_text()
    assert "Loss by part" in page
    assert all(f"following {part}" in page for part in PARTS[1:])


def test_a_run_with_segments_is_not_exported(run, tmp_path):
    stage = (run / "stage.yaml").read_text()
    segmented = tmp_path / "segmented"
    segmented.mkdir()
    (segmented / "checkpoints").symlink_to(run / "checkpoints")
    (segmented / "stage.yaml").write_text(stage.replace("segments: []", "segments: [0.5]"))
    with pytest.raises(UserError, match="sample from the run itself"):
        export.export(segmented, tmp_path / "out", "ema", "fp32", "5GB")
