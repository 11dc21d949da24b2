"""The small VAE: deterministic, standardized without a change to its images, written whole or not at all."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_prep.dataset.schema import Commit, Manifest, Part
from data_prep.pairs.pairs import Pair
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.encoders.vae import VAE, small_vae
from pipeline import train_vae
from pipeline.engine import muon
from pipeline.train_vae import (
    Training,
    VAEOptimizer,
    batches,
    psnr,
    read_images,
    standardize,
    steps_within,
    train,
    train_into,
)
from tests.helpers.networks import normal

CPU = torch.device("cpu")
TINY = Training(steps=3, batch=4, crop=16, images=100)


def box_images(count: int, size: tuple[int, int] = (16, 24)) -> list[torch.Tensor]:
    """White images with a colored box."""
    images = []
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = np.full((*size, 3), 255, np.uint8)
        top, left = rng.integers(0, 8, 2)
        pixels[top : top + 7, left : left + 9] = rng.integers(0, 255, 3)
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return images


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    """A store whose committed pairs are two parts of images, those of the second smaller than a crop."""
    sizes = {Part("16x24", 0): (16, 24), Part("8x8", 0): (8, 8)}

    def read_pairs(dataset, commit, kinds):
        pairs = []
        for number, image in enumerate(box_images(commit.rows, sizes[commit.part])):
            data = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "PNG")
            pairs.append(Pair(number, str(number), data.getvalue(), [], *sizes[commit.part]))
        return pairs

    commits = {part: Commit("pairs", part.bucket, part.number, 6, "attempt", "", []) for part in sizes}
    monkeypatch.setattr(train_vae, "committed", lambda *_: commits)
    monkeypatch.setattr(train_vae, "read_pairs", read_pairs)
    store = open_store(str(tmp_path / "store"), create=True)
    store.put(Manifest.KEY, Manifest("ds", ["original"], {}).to_json())
    return store


def test_the_same_seed_gives_the_same_weights():
    first, second = (train(box_images(8), TINY, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(box_images(8), replace(TINY, seed=1), CPU).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_moves_every_weight_and_lowers_the_loss():
    images, steps = box_images(16), replace(TINY, steps=25)
    torch.manual_seed(TINY.seed)
    fresh = small_vae()
    trained = train(images, steps, CPU)
    unmoved = [
        name for name, value in trained.state_dict().items() if torch.equal(value, fresh.state_dict()[name])
    ]
    assert not unmoved
    assert psnr(trained, images, TINY, CPU) > psnr(fresh.eval(), images, TINY, CPU) + 3


def test_standardizing_leaves_the_images_and_evens_the_channels():
    images = box_images(32)
    torch.manual_seed(0)
    vae = small_vae().eval().requires_grad_(False)
    vae.quant_conv.bias[:16] += torch.linspace(-3, 3, 16)
    vae.quant_conv.weight[:16] *= torch.linspace(0.2, 4, 16).view(-1, 1, 1, 1)
    pixels = next(batches(images, TINY, torch.Generator()))
    before = vae.encode(pixels).latent_dist
    decoded = vae.decode(before.mean).sample
    standardize(vae, images, TINY, CPU)
    after = vae.encode(pixels).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-3)
    source = batches(images, TINY, torch.Generator().manual_seed(TINY.seed))
    posteriors = [vae.encode(next(source)).latent_dist for _ in range(8)]
    latents = torch.cat(
        [posterior.mean + posterior.std * torch.randn_like(posterior.std) for posterior in posteriors]
    )
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)


def test_an_epoch_shows_each_image_once():
    images = box_images(8, (16, 16))
    source = batches(images, replace(TINY, batch=4), torch.Generator().manual_seed(3))
    seen = torch.cat([next(source), next(source)])
    expected = torch.stack(images).float() / 127.5 - 1
    assert sorted(map(str, seen.sum((1, 2, 3)).tolist())) == sorted(
        map(str, expected.sum((1, 2, 3)).tolist())
    )


def test_images_smaller_than_a_crop_are_left_out_and_the_limit_holds(dataset):
    assert len(read_images(dataset, 16, 100)) == 6
    assert len(read_images(dataset, 8, 100)) == 12
    assert len(read_images(dataset, 8, 4)) == 4
    with pytest.raises(UserError, match="no images of at least 64x64"):
        read_images(dataset, 64, 100)


def test_the_folder_is_one_that_diffusers_loads_and_an_equal_one_is_kept(dataset, tmp_path, capsys):
    out = tmp_path / "vae"
    train_into(dataset, out, TINY)
    vae = VAE.load(str(out), None, CPU)
    assert (vae.channels, vae.downsampling) == (16, 8)
    assert vae.statistics == {"scaling_factor": 1.0, "shift_factor": 0.0}
    assert json.loads((out / "training.json").read_text())["psnr"] > 0
    written = (out / "config.json").stat().st_mtime_ns
    train_into(dataset, out, TINY)
    assert "already trained" in capsys.readouterr().out
    assert (out / "config.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="remove it"):
        train_into(dataset, out, replace(TINY, seed=1))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failure_leaves_nothing_behind(dataset, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train_vae, "psnr", fail)
    with pytest.raises(RuntimeError):
        train_into(dataset, tmp_path / "vae", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_steps_are_those_that_fit_at_the_speed_of_the_first(monkeypatch):
    seconds, taken = 100.0, []

    def train_at_two_steps_per_second(images, training, device):
        nonlocal seconds
        taken.append(training.steps)
        # the first training of a process is slower
        seconds += training.steps * (0.5 if len(taken) > 1 else 5.0)

    monkeypatch.setattr(train_vae, "train", train_at_two_steps_per_second)
    monkeypatch.setattr(train_vae.time, "monotonic", lambda: seconds)
    assert steps_within(3.0, [], TINY, CPU) == 360
    assert steps_within(1e-9, [], TINY, CPU) == 1
    assert sum(taken) == 2 * (1 + train_vae.MEASURED_STEPS)


def test_a_training_of_some_minutes_is_one_of_that_many_steps(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_vae, "steps_within", lambda minutes, *_: int(minutes * 4))
    train_into(dataset, tmp_path / "timed", replace(TINY, steps=900), minutes=0.5)
    train_into(dataset, tmp_path / "counted", replace(TINY, steps=2))
    timed, counted = (VAE.load(str(tmp_path / name), None, CPU) for name in ("timed", "counted"))
    assert timed.identity == counted.identity
    assert json.loads((tmp_path / "timed" / "training.json").read_text())["settings"]["steps"] == 2

    # asked again on a faster machine, it is the same VAE; with other settings it is not
    train_into(dataset, tmp_path / "timed", TINY, minutes=2.0)
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(UserError, match="remove it"):
        train_into(dataset, tmp_path / "timed", replace(TINY, seed=1), minutes=0.5)


def test_the_convolutions_take_the_steps_of_torchs_muon(monkeypatch):
    monkeypatch.setattr(muon, "product_dtype", lambda x: x.dtype)
    vae = small_vae().train()
    ours = VAEOptimizer(vae, lr=0.02)
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in ours.kernels]
    torchs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95)

    for step in range(3):
        for kernel, matrix in zip(ours.kernels, matrices, strict=True):
            kernel.grad = normal(*kernel.shape, seed=step).float()
            matrix.grad = kernel.grad.flatten(1).clone()
        torchs.param_groups[0]["lr"] = 0.02 * (step + 1) / 3
        torchs.step()
        ours.step((step + 1) / 3)

    for kernel, matrix in zip(ours.kernels, matrices, strict=True):
        assert torch.equal(kernel.flatten(1), matrix)
