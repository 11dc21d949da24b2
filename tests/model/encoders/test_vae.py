"""The VAE as a latent space: moments, normalization, identity, and what it refuses to load."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.encoders.latent_spaces import CONFIG, WEIGHTS, load_latent_space, normalize_latents
from model.encoders.vae import VAE, small_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    module = small_vae()
    module.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    path = tmp_path_factory.mktemp("vae")
    module.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return VAE.load(str(folder), None, CPU)


def changed(folder, tmp_path, **fields):
    copy = tmp_path / "vae"
    copy.mkdir()
    config = json.loads((folder / CONFIG).read_text()) | fields
    (copy / CONFIG).write_text(json.dumps(config))
    (copy / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    return copy


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=8)
def test_any_multiple_of_the_downsampling_encodes_and_decodes(vae, rows, columns, batch):
    pixels = torch.rand(batch, 3, 8 * rows, 8 * columns) * 2 - 1
    mean, std = vae.encode(pixels)
    assert mean.shape == std.shape == (batch, 16, rows, columns)
    assert (std > 0).all()
    decoded = vae.decode(normalize_latents(mean + std * torch.randn_like(std), vae.statistics))
    assert decoded.shape == pixels.shape
    assert decoded.abs().max() <= 1


def test_normalizing_and_decoding_are_inverse(vae):
    mean = torch.randn(2, 16, 2, 2)
    latents = normalize_latents(mean, vae.statistics)
    assert vae.statistics == {"scaling_factor": 1.5, "shift_factor": 0.25}
    torch.testing.assert_close(latents, (mean - 0.25) * 1.5)
    expected = vae.module.decode(mean, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents), expected, atol=1e-5, rtol=1e-5)


def test_an_image_encodes_the_same_alone_and_in_a_batch(vae):
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(vae.encode(pixels)[0][1:2], vae.encode(pixels[1:2])[0], atol=1e-5, rtol=1e-5)


def test_the_identity_follows_the_weights_and_not_the_place(folder, vae, tmp_path):
    copy = changed(folder, tmp_path, scaling_factor=2.0)
    assert VAE.load(str(copy), None, CPU).identity == vae.identity
    other = tmp_path / "other"
    torch.manual_seed(1)
    small_vae().save_pretrained(other)
    assert VAE.load(str(other), None, CPU).identity != vae.identity


def test_a_pipelines_vae_is_found_in_its_subfolder(folder, vae, tmp_path):
    folder = changed(folder, tmp_path)
    assert VAE.load(str(folder.parent), None, CPU).identity == vae.identity


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    copy = changed(folder, tmp_path, latent_channels=8)
    with pytest.raises(UserError, match="do not fit"):
        VAE.load(str(copy), None, CPU)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin"),
            "pickled weights are never opened",
        ),
        (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:1000]), "do not fit"),
        (lambda path: (path / CONFIG).unlink(), "no config.json"),
        (lambda path: (path / CONFIG).write_text("{"), "not JSON"),
        (lambda path: (path / CONFIG).write_text('{"_class_name": "UNet2DModel"}'), "not an AutoencoderKL"),
    ],
)
def test_a_folder_that_is_no_vae_is_refused_in_one_line(folder, tmp_path, spoil, message):
    copy = changed(folder, tmp_path)
    spoil(copy)
    with pytest.raises(UserError, match=message):
        VAE.load(str(copy), None, CPU)


def test_no_vae_named_is_refused():
    with pytest.raises(UserError, match="no VAE is named"):
        VAE.load("", None, CPU)


def test_the_folders_class_decides_which_space_is_loaded(folder, vae, tmp_path):
    space = load_latent_space(str(folder), None, CPU)
    assert (type(space), space.name, space.identity) == (VAE, "AutoencoderKL", vae.identity)
    copy = changed(folder, tmp_path, _class_name="UNet2DModel")
    with pytest.raises(UserError, match="holds a UNet2DModel, not an AutoencoderKL or other latent space"):
        load_latent_space(str(copy), None, CPU)
