"""Fitting a new user: only coefficients or a row change, and a trained user is found again."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model.common.errors import UserError
from pipeline import fit_user as command
from pipeline.diffusion.objective import make_objective
from pipeline.inference.fit import FitSettings, fit_user
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.users import read_user
from pipeline.stage.objective import PatchTimesConfig
from tests.helpers.tiny_sampler import make_sampler, sampler_with_users

CAPTIONS = ["a red cat", "dogs", "a blue hat"]


def images(count=3):
    return torch.randn(count, 16, 2, 3, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("by", ["coefficients", "row"])
def test_a_fit_lowers_the_loss_and_changes_no_weight(by):
    sampler = sampler_with_users(4)
    before = {name: value.clone() for name, value in sampler.network.state_dict().items()}
    fitted = fit_user(sampler, images(), CAPTIONS, FitSettings(by))
    after = sampler.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in sampler.network.parameters())
    # Against the start at the very same noise and times, since a loss depends far more on these.
    start = fit_user(sampler, images(), CAPTIONS, FitSettings(by, lr=0.0))
    assert fitted.losses[0] == start.losses[0]
    assert np.mean(fitted.losses[-100:]) < np.mean(start.losses[-100:])
    assert fitted.tokens.shape == (2, 8)
    assert (fitted.coefficients is None) == (by == "row")


def test_the_tokens_are_the_mixture_of_the_coefficients_and_deleted_users_have_no_part():
    sampler = sampler_with_users(4)
    table = sampler.network.adapters["users"].table.weight
    with torch.no_grad():
        table[2] = 0.0
    fitted = fit_user(sampler, images(), CAPTIONS, FitSettings(steps=3))
    known = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert torch.equal(fitted.tokens.flatten(), (fitted.coefficients * known) @ table)
    assert not torch.allclose(fitted.coefficients, known / 3)


def test_the_same_seed_gives_the_same_user():
    fits = [fit_user(sampler_with_users(4), images(), CAPTIONS, FitSettings(steps=4, seed=5)) for _ in "ab"]
    assert torch.equal(fits[0].tokens, fits[1].tokens)
    other = fit_user(sampler_with_users(4), images(), CAPTIONS, FitSettings(steps=4, seed=6))
    assert not torch.equal(other.tokens, fits[0].tokens)


def test_a_network_without_users_and_a_folder_without_images_are_named():
    with pytest.raises(UserError, match="no users"):
        fit_user(make_sampler(), images(), CAPTIONS, FitSettings())
    with pytest.raises(UserError, match="no images"):
        fit_user(sampler_with_users(4), images(0), [], FitSettings())
    sampler = sampler_with_users(4)
    sampler.network.adapters["users"].table.weight.zero_()
    with pytest.raises(UserError, match="--by row"):
        fit_user(sampler, images(), CAPTIONS, FitSettings())


def test_the_command_writes_a_file_that_sampling_reads(tmp_path, monkeypatch, capsys):
    sampler = sampler_with_users(4)
    monkeypatch.setattr(command, "load_source", lambda *_: sampler)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    out = tmp_path / "anna.safetensors"
    arguments = ["fit_user", "run", "--pictures", str(pictures), "--out", str(out), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        command.main()
    assert "0.txt: not there: write the caption of 0.png" in capsys.readouterr().err
    for number in range(2):
        (pictures / f"{number}.txt").write_text(CAPTIONS[number])
    command.main()
    assert read_user(out).shape == (2, 8)
    params = SamplingParams(2, 3.0, 16, 24, user=str(out))
    assert torch.isfinite(sampler.latents(["x"], [0], params)).all()


@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"shift": 3.0, "shift_positions": 2}, {"patch_times": PatchTimesConfig("ltg", 4)}],
)
def test_the_loss_of_a_fit_is_that_of_training(settings):
    """One step on one image at a fixed seed: the first loss is that of the start, computed here by hand."""
    sampler = sampler_with_users(4)
    sampler.objective = replace(sampler.objective, **settings)
    latents = images(1)
    fitted = fit_user(sampler, latents, CAPTIONS[:1], FitSettings(steps=1, seed=1))
    generator = torch.Generator().manual_seed(1)
    torch.randint(1, (1,), generator=generator)
    noise = torch.randn(1, *latents.shape[1:], generator=generator)
    objective = make_objective(sampler.objective, (1, 1))
    u = torch.rand(1, generator=generator)
    example = objective.training_example(
        latents, noise, u, lambda _, shape: torch.randn(1, *shape, generator=generator)
    )
    condition = sampler.condition(CAPTIONS[:1], SamplingParams(user="0"))
    condition.timesteps, condition.levels = example.timesteps, example.levels
    table = sampler.network.adapters["users"].table.weight
    condition.users.tokens = table.mean(0).view(1, 2, 8)
    expected = objective.loss(sampler.network(example.noisy, condition), example.target).item()
    assert fitted.losses == [pytest.approx(expected, rel=1e-5)]
    assert (example.levels is not None) == ("patch_times" in settings)


@pytest.mark.parametrize("count", [4, 1000])
def test_the_first_step_is_a_share_of_the_start_however_many_users_there_are(count):
    fitted = fit_user(sampler_with_users(count), images(), CAPTIONS, FitSettings(steps=1, lr=0.2))
    assert (fitted.coefficients - 1 / count).abs().max().item() == pytest.approx(0.2 / count, rel=1e-2)


def test_the_rate_falls_to_zero(monkeypatch):
    rates = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    fit_user(sampler_with_users(4), images(), CAPTIONS, FitSettings(steps=8, lr=0.2))
    assert rates[0] == pytest.approx(0.2 / 4)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]
