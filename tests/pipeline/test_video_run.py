"""From moving scenes to scored clips by the commands themselves."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.clips.media import decode_clip
from model.common.errors import UserError
from pipeline import follow, sample
from pipeline.inference.clips import make_moving_grid, save_clip, to_clips
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.inference.studio import GenerationRequest, InteractiveSampler, Limits
from pipeline.reporting.page import build, inline_image
from pipeline.runtime.run_log import read_events, read_reports
from tests.helpers import pixel_space
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_dataset import write_dataset, write_stage

pytestmark = pytest.mark.timeout(300)
FRAMES = 5
SOURCE = "{kind: moving_scenes, scenes: {count: 16, seed: 0, scale: 1.6}, captions: {list: list}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on clips of pixels, with previews."""
    folder = tmp_path_factory.mktemp("clips")
    path = write_dataset(folder, SOURCE, "list")
    named = path.read_text().replace(f"vae: {folder}/vae", "space: pixel_clips")
    path.write_text(f"{named}clips: {{frames: [{FRAMES}], fps: 8.0, format: webp}}\n")
    for step in ("plan", "pairs", "latents", "text", "snapshot"):
        data_prep([step, str(path)])

    stage = write_stage(folder, "clips")
    settings = ["sample.every_samples=16", "sample.scenes=2", f"sample.frames={FRAMES}", "sample.fps=4"]
    settings += ["sample.scenes_scale=1.6", "model.predicts=clean", "objective.shift_positions=16"]
    assert on_ranks(1, pixel_space.train, str(stage), settings) == [0]
    return folder / "runs" / "clips"


def test_previews_move_and_are_scored(run):
    assert all(np.isfinite(report["loss"]) for report in read_reports(run))
    (sheet,) = (run / "grids").glob("*.png")
    with Image.open(sheet.with_suffix(".webp")) as moving:
        assert moving.n_frames == FRAMES
    (scores,) = read_events(run, "scenes")
    assert {"motion", "colour", "following", "chance"} <= scores.keys()
    # The report shows the grid that moves.
    assert inline_image(sheet.with_suffix(".webp")) in build(run).read_text()


def test_clips_are_sampled_and_scored(run, tmp_path, monkeypatch):
    out = tmp_path / "follow"
    for arguments in (["write", "--count", "3", "--segments", "1"], ["score"]):
        prompts = ["--prompts", "moving", "--scale", "1.6"] if "write" in arguments else []
        monkeypatch.setattr(sys, "argv", ["follow", arguments[0], str(out), *arguments[1:], *prompts])
        follow.main()
        if "write" in arguments:
            drawn = ["--prompts", str(out / "prompts.txt"), "--out", str(out / "pictures"), "--fps", "5"]
            monkeypatch.setattr(sys, "argv", ["sample", str(run), *drawn])
            sample.main()

    records = [json.loads(line) for line in (out / "pictures" / "index.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == [f"{number:05d}_00.webp" for number in range(3)]
    assert {(record["frames"], record["fps"]) for record in records} == {(FRAMES, 5.0)}
    clip = decode_clip((out / "pictures" / records[0]["file"]).read_bytes(), FRAMES)
    assert clip.shape == (FRAMES, 32, 32, 3)
    with Image.open(out / "pictures" / "grid.webp") as moving:
        assert moving.n_frames == FRAMES
        moving.load()
        assert moving.info["duration"] == 200
    scores = json.loads((out / "scores.json").read_text())
    assert {"motion", "colour"} <= scores["summary"].keys()


def test_a_clip_is_the_same_in_any_batch_and_an_image_is_one_frame(run):
    sampler = Sampler.from_run(run, "ema", torch.device("cpu"), torch.float32)
    params = SamplingParams(steps=2, height=32, width=32, frames=FRAMES)
    both = sampler.latents(["a red circle that moves left.", "a cat"], [0, 1], params)
    assert both.shape == (2, 768, 2, 4, 4)
    assert torch.equal(sampler.latents(["a cat"], [1], params), both[1:])
    assert to_clips(sampler.pixels(both))[0].shape == (FRAMES, 32, 32, 3)
    image = SamplingParams(steps=2, height=32, width=32)
    assert sampler.latents(["a cat"], [1], image).shape == (1, 768, 1, 4, 4)
    assert "frames" in params.record()
    assert "frames" not in image.record()
    for wrong, says in (({"frames": 4}, "4 frames: this latent space"), ({"height": 20}, "multiple of 8")):
        with pytest.raises(UserError, match=says):
            sampler.check(SamplingParams(**{"steps": 2, "height": 32, "width": 32, "frames": 5, **wrong}))
    with pytest.raises(UserError, match="was not trained to go on from a frame"):
        sampler.check(SamplingParams(height=32, width=32, frames=5, first_frame="image.png"))


def test_files_of_clips_come_back(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (FRAMES, 16, 24, 3), np.uint8)
    save_clip(clip, tmp_path / "clip.webp", {"fps": 8.0})
    assert np.array_equal(decode_clip((tmp_path / "clip.webp").read_bytes(), FRAMES), clip)
    (tmp_path / "grid.webp").write_bytes(make_moving_grid([clip, clip], ["one", "two"], 8.0))
    with Image.open(tmp_path / "grid.webp") as moving:
        moving.load()
        assert (moving.n_frames, moving.info["duration"]) == (FRAMES, 125)


def test_the_page_generates_clips(run, tmp_path):
    sampler = Sampler.from_run(run, "ema", torch.device("cpu"), torch.float32)
    studio = InteractiveSampler({"run": sampler}, tmp_path, Limits(side=64, steps=4, images=2))
    request = GenerationRequest("a cat", "", 32, 32, 2, 3.0, 0, 1, "")
    (column,) = studio.generate(request)
    assert column.files[0].suffix == ".webp"
    assert decode_clip(column.files[0].read_bytes(), FRAMES).shape == (FRAMES, 32, 32, 3)
    with pytest.raises(UserError, match="are shown of images"):
        studio.generate(replace(request, attention=1))
