"""The chain of shipped stages from images to short and then to long clips: its checks before anything is
submitted, and its jobs on a real Slurm."""

from dataclasses import replace

import pytest

from model.common.errors import UserError
from pipeline.operations.preflight import before_submission
from pipeline.stage.config import load_stage
from tests.helpers import fake_snapshot as fake

pytestmark = pytest.mark.timeout(120)
CHAIN = ("li_dit_1b_256", "video_1b_256_short", "video_1b_256_long")
SHARED = ("data.latents=latents_video", "model.preset=tiny", "model.compile=false")
LLMS = ("llama3_8b", "qwen1_5_7b")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Images and clips with the families that the stages name; clips have an instruction of their own."""
    latents = replace(fake.CLIPS, name="latents_video")
    for dataset, suffix, buckets in (("pairs", "", {"32x32": [8]}), ("clips", "_video", {"32x32x5": [8]})):
        texts = []
        for llm in LLMS:
            monkeypatch.setitem(fake.WIDTHS, llm + suffix, (6, "int8"))
            identity = {"llm": llm, "layer": "-3", "prefix": f"Describe the {dataset}: "}
            texts.append(replace(fake.TEXTS["small"], name=llm + suffix, identity=identity))
        fake.make(tmp_path / "store", buckets, tmp_path, [latents, *texts], dataset)
    return tmp_path / "store"


def test_each_stage_of_the_chain_fits_images_and_clips_with_their_own_instructions(store):
    for number, name in enumerate(CHAIN):
        stage = load_stage(name, [f"data.store={store}", *SHARED])
        before_submission(stage, 1, None, after_another=number > 0)
    shared = [name.removesuffix("_video") for name in stage.fusion.clip_families]
    assert shared == stage.fusion.families == list(LLMS)
    assert all(name.endswith("_video") for name in stage.fusion.clip_families)

    # Of the shipped stages the largest batches are whole, of images and of clips.
    short, long = (load_stage(name) for name in CHAIN[1:])
    assert short.batch(32 * 32) == long.batch(32 * 32) == 2048
    assert (short.batch(5 * 32 * 32), long.batch(17 * 32 * 32)) == (384, 64)
    other = load_stage(CHAIN[1], [f"data.store={store}", *SHARED, "fusion.clip_families=[other,other]"])
    with pytest.raises(UserError, match="no text family `other`"):
        before_submission(other, 1, None, after_another=True)


@pytest.mark.slurm
def test_the_chain_is_submitted_with_each_stage_after_the_one_before(slurm, training, store):
    runs = training.folder / "runs"
    settings = (f"data.store={store}", f"runs={runs}", *SHARED)
    printed = training.type("cluster/stages.sh", "--hold", *CHAIN, *settings)
    rows = [line.split() for line in printed.splitlines() if line.split()[0].isdigit()]
    jobs = [row[0] for row in rows]
    assert [row[2] for row in rows] == list(CHAIN)
    assert [row[3:] for row in rows] == [[], [f"afterok:{jobs[0]}"], [f"afterok:{jobs[1]}"]]
    for job, before in zip(jobs[1:], CHAIN, strict=False):
        command = slurm.run("scontrol", "show", "job", "-o", job)
        assert f"start_from={runs}/{before}" in command
