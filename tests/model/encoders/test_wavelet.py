"""The wavelet autoencoder: an exact transform, a teacher's latents, files without pickles."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.encoders.latent_spaces import load_latent_space, same_latents
from model.encoders.vae import VAE, small_vae
from model.encoders.wavelet import WAVELET, WaveletAutoencoder, WaveletConfig, haar, inverse_haar
from pipeline import train_vae
from pipeline.inference.sampler import load_vae
from pipeline.stage.config import StageConfig
from pipeline.train_vae import Training, psnr, train, train_into
from pipeline.vae.distillation import distillation_loss, read_teacher
from tests.helpers.networks import normal
from tests.pipeline.test_train_vae import box_images

CPU = torch.device("cpu")
TINY = Training(steps=30, batch=8, crop=16, images=64, lr=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_the_transform_keeps_energy_and_is_undone(channels, height, width):
    x = normal(2, channels, 2 * height, 2 * width)
    bands = haar(x)
    assert bands.shape == (2, 4 * channels, height, width)
    assert torch.allclose(inverse_haar(bands), x, atol=1e-12)
    assert torch.allclose(bands.square().sum(), x.square().sum())
    # a constant has one band
    flat = haar(torch.ones(1, 1, 4, 4, dtype=torch.float64))
    assert torch.equal(flat[:, :1], torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64))
    assert not flat[:, 1:].any()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and its student, trained for moments."""
    folder = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "teacher")
    teacher = read_teacher(str(folder / "teacher"), CPU)
    student = train(box_images(16), TINY, CPU, teacher)
    student.save_pretrained(folder / "student")
    return folder


def test_it_learns_the_teachers_latents(folders):
    teacher = read_teacher(str(folders / "teacher"), CPU)
    student = load_latent_space(str(folders / "student"), None, CPU)
    fresh = WaveletAutoencoder(WaveletConfig())
    pixels = torch.stack(box_images(8, (16, 16))).float() / 127.5 - 1
    losses = [
        distillation_loss(each, teacher, pixels, torch.Generator().manual_seed(0)).item()
        for each in (fresh, student.module)
    ]
    assert losses[1] < losses[0]
    own, theirs = student.encode(pixels), teacher.encode(pixels)
    assert [each.shape for each in own] == [each.shape for each in theirs]
    # the decoder takes the teacher's latents as its own
    assert student.decode_raw(theirs[0]).shape == pixels.shape
    assert psnr(student.module, box_images(16), TINY, CPU) > psnr(fresh, box_images(16), TINY, CPU)
    assert all(parameter.grad is None for parameter in teacher.module.parameters())


def test_files_are_a_config_and_safetensors(folders, tmp_path):
    names = {path.name for path in (folders / "student").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    space = load_latent_space(str(folders / "student"), None, CPU)
    again = load_latent_space(str(folders / "student"), None, CPU, WAVELET)
    assert space.identity == again.identity
    pixels = normal(1, 3, 16, 24).float()
    assert torch.equal(space.encode(pixels)[0], again.encode(pixels)[0])

    config = json.loads((folders / "student" / "config.json").read_text())
    for wrong, message in (({"width": 64}, "do not fit"), ({"widht": 96}, "widht"), ({"width": -1}, "width")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
            (folders / "student" / "diffusion_pytorch_model.safetensors").read_bytes()
        )
        with pytest.raises(UserError, match=message):
            load_latent_space(str(tmp_path), None, CPU)


def test_families_of_either_are_decoded_by_both(folders):
    teacher, student = (load_latent_space(str(folders / name), None, CPU) for name in ("teacher", "student"))
    torch.manual_seed(1)
    stranger = VAE(small_vae(), "0" * 64)
    for space in (teacher, student):
        identity = {"space": space.name, **json.loads(json.dumps(space.identity))}
        info = {"vae": str(folders / "teacher"), "revision": None}
        family = Family("latents", "latents", identity, info)
        for name in ("teacher", "student"):
            stage = StageConfig(vae=str(folders / name))
            assert type(load_vae(stage, family, CPU)) is type({"teacher": teacher, "student": student}[name])
        assert not same_latents(stranger.identity, identity)
        assert not same_latents(identity, stranger.identity)
    other = {**student.identity, "teacher": stranger.identity}
    assert not same_latents(other, student.identity)


def test_the_quality_of_encoder_and_decoder_one_by_one_is_recorded(folders, tmp_path, monkeypatch):
    images, out = box_images(8, (16, 16)), tmp_path / "wavelet"
    monkeypatch.setattr(train_vae, "committed", lambda *_: {})
    monkeypatch.setattr(train_vae, "read_images", lambda *_: images)
    train_into(None, out, TINY, teacher_folder=str(folders / "teacher"))
    teacher, student = (load_latent_space(str(path), None, CPU) for path in (folders / "teacher", out))
    pixels, expected = torch.stack(images).float() / 127.5 - 1, {}
    for name, encoder, decoder in (
        ("psnr", student, student),
        ("psnr_own_encoder", student, teacher),
        ("psnr_own_decoder", teacher, student),
    ):
        decoded = decoder.decode_raw(encoder.encode(pixels)[0])
        errors = ((decoded - pixels) / 2).square().mean((1, 2, 3))
        expected[name] = pytest.approx(-10 * errors.log10().mean().item(), abs=1e-3)
    record = json.loads((out / "training.json").read_text())
    del record["settings"]
    assert record == expected
    assert len({round(value, 3) for value in record.values()}) == 3


def test_a_teacher_is_an_autoencoder_kl(folders):
    with pytest.raises(UserError, match=f"it holds a {WAVELET}"):
        read_teacher(str(folders / "student"), CPU)
