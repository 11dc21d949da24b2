"""A latent space from outside the package and without weights, from a dataset to an image."""

import math

import pytest
import torch

from data_prep.__main__ import main as data_prep
from data_prep.dataset.snapshot_reader import read_snapshot
from model.common.errors import UserError
from model.encoders.latent_spaces import normalize_latents
from pipeline.export import export
from pipeline.inference.images import to_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.run_log import read_reports
from pipeline.stage.config import load_stage
from pipeline.stage.corpus import open_datasets
from tests.helpers import pixel_space
from tests.helpers.distributed import on_ranks
from tests.helpers.tiny_dataset import write_dataset, write_stage

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps on scenes in the toy space, with preview images."""
    folder = tmp_path_factory.mktemp("pixels")
    path = write_dataset(
        folder, "{kind: scenes, scenes: {count: 16, seed: 0}, captions: {list: list}}", "list"
    )
    named = path.read_text().replace(f"vae: {folder}/vae", "space: toy_pixels")
    assert "toy_pixels" in named
    path.write_text(named)
    for step in ("plan", "pairs", "latents", "text", "snapshot"):
        data_prep([step, str(path)])

    stage = write_stage(folder, "toy")
    previews = ["sample.every_samples=16", "sample.prompts=[a red circle]"]
    assert on_ranks(1, pixel_space.train, str(stage), previews) == [0]
    return folder / "runs" / "toy"


def test_it_is_trained_in(run):
    stage = load_stage(str(run.parent.parent / "toy.yaml"), [])
    family = read_snapshot(open_datasets(stage)[0], "latest").families["latents"]
    assert family.identity["space"] == "toy_pixels"
    assert family.info["latents_std"] == list(pixel_space.STD)
    reports = read_reports(run)
    assert reports
    assert all(math.isfinite(report["loss"]) for report in reports)
    assert list((run / "grids").glob("*.png"))


def test_its_latents_are_sampled_and_decoded_to_an_image(run):
    sampler = Sampler.from_run(run, "ema", torch.device("cpu"), torch.float32)
    assert isinstance(sampler.vae, pixel_space.PixelSpace)
    latents = sampler.latents(["a red circle"], [0], SamplingParams(steps=2, height=32, width=32))
    assert latents.shape == (1, pixel_space.CHANNELS, 4, 4)
    (image,) = to_images(sampler.pixels(latents))
    assert image.size == (32, 32)

    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = sampler.vae.encode(pixels)
    torch.testing.assert_close(sampler.pixels(normalize_latents(mean, sampler.vae.statistics)), pixels)


def test_an_export_of_it_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(
        UserError, match="latent space `toy_pixels`: an export holds a diffusers AutoencoderKL"
    ):
        export(run, tmp_path / "out", "ema", "fp32", "5GB")
    assert not (tmp_path / "out").exists()
