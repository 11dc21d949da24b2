"""An export of a network of clips: a diffusers pipeline whose clips are those of the run."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from model.common.errors import UserError
from model.dit import LIDiT
from model.encoders.video_vae import WanVAE
from pipeline import diffusers_pipeline
from pipeline.diffusers_video_pipeline import LIDiTVideoPipeline
from pipeline.export import build_pipeline
from pipeline.inference.clips import read_first_frame
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import load_export
from tests.helpers import tiny_sampler
from tests.helpers.networks import randomise
from tests.model.encoders.test_video_spaces import TINY

PARAMS = SamplingParams(steps=2, guidance=3.0, height=16, width=24, frames=5)


@pytest.fixture(scope="module")
def sampler():
    """A sampler of clips in the latents of a tiny Wan VAE with random weights."""
    sampler = tiny_sampler.sampler_with_families("flow")
    torch.manual_seed(0)
    space = WanVAE(diffusers.AutoencoderKLWan(**TINY["AutoencoderKLWan"]).eval().requires_grad_(False), "")
    sizes = replace(sampler.network.sizes, channels=space.channels, axes=3)
    network = LIDiT(sizes, sampler.network.fusion.config, list(tiny_sampler.WIDTHS.values()))
    sampler.network = randomise(network, std=0.05).float().requires_grad_(False)
    sampler._vae, sampler.defaults = space, replace(sampler.defaults, frames=5, fps=6.0)
    sampler.objective = replace(sampler.objective, shift=2.0, shift_positions=6)
    return sampler


def test_an_export_generates_the_clips_of_the_run(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(
        diffusers_pipeline,
        "load_llm",
        lambda family, device: tiny_sampler.LetterLLM(tiny_sampler.WIDTHS[family.name]),
    )
    sampler.defaults = replace(sampler.defaults, height=16, width=24)
    expected = sampler.latents(["a red cat"], [5], PARAMS)
    assert expected.shape == (1, 16, 2, 2, 3)
    build_pipeline(sampler).save_pretrained(tmp_path / "export")

    pipeline = LIDiTVideoPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    sampled = pipeline("a red cat", output_type="latent", **arguments)
    assert torch.equal(sampled.frames, expected)
    clips = pipeline("a red cat", output_type="np", **arguments).frames
    assert clips.shape == (1, 5, 16, 24, 3)
    (images,) = pipeline("a red cat", **arguments).frames
    assert len(images) == 5
    assert np.array_equal(np.asarray(images[2]), (clips[0, 2] * 255).round().astype(np.uint8))
    assert pipeline("a cat", num_frames=1, output_type="pt", **arguments).frames.shape == (1, 1, 3, 16, 24)
    with pytest.raises(UserError, match="4 frames: this latent space"):
        pipeline("a cat", num_frames=4, **arguments)

    loaded = load_export(tmp_path / "export", torch.device("cpu"), torch.float32)
    assert (loaded.defaults.frames, loaded.defaults.fps) == (5, 6.0)
    assert torch.equal(loaded.latents(["a red cat"], [5], PARAMS), expected)
    with pytest.raises(UserError, match="of other parts than"):
        diffusers_pipeline.LIDiTPipeline.from_pretrained(tmp_path / "export")


def test_a_clip_begins_with_a_given_image(sampler, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    params = replace(PARAMS, first_frame=str(path))
    with pytest.raises(UserError, match="was not trained to go on from a frame"):
        sampler.check(params)

    sampler.network.sizes = replace(sampler.network.sizes, time_levels=2)
    sampler.check(params)
    begun = sampler.latents(["a red cat"], [5], params)
    assert torch.equal(begun[:, :, :1], read_first_frame(path, 16, 24, sampler.vae))
    free = sampler.latents(["a red cat"], [5], PARAMS)
    assert not torch.allclose(begun[:, :, 1:], free[:, :, 1:])
    with pytest.raises(UserError, match=r"--first-frame .*none\.png"):
        read_first_frame(tmp_path / "none.png", 16, 24, sampler.vae)
