"""Training objectives: their times, mixtures and targets, and that they agree with the samplers'
schedulers."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.ddpm import DDPM_BETAS, DDPM_STEPS, ddpm_alphas
from pipeline.diffusion.objective import make_objective
from pipeline.stage.objective import ObjectiveConfig

SHAPE = (64, 4, 2, 3)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def uniform(count: int) -> torch.Tensor:
    return (torch.arange(count) + 0.5) / count


def example(config, clean, noise, u):
    """Noisy latents, timesteps and target."""
    made = make_objective(config).training_example(clean, noise, u, normal=None)
    return made.noisy, made.timesteps, made.target


def times(u, **config):
    return make_objective(ObjectiveConfig(**config)).sample_timesteps(u)


configs = st.builds(
    ObjectiveConfig,
    name=st.sampled_from(["flow", "ddpm"]),
    timesteps=st.sampled_from(["uniform", "logit_normal"]),
    logit_mean=st.floats(-1, 1),
    logit_std=st.floats(0.3, 2),
    shift=st.floats(0.5, 6),
)


@given(configs, st.integers(0, 2**16))
@settings(deadline=None, max_examples=40)
def test_the_target_and_the_noisy_latents_give_the_clean_ones_back(config, seed):
    clean, noise = latents(seed), latents(seed + 1)
    noisy, t, target = example(config, clean, noise, uniform(len(clean)))
    assert noisy.dtype == t.dtype == target.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    time = t.view(-1, 1, 1, 1)
    if config.name == "flow":
        recovered = noisy - time * target
    else:
        alpha = ddpm_alphas()[(t * DDPM_STEPS).round().long()].view(-1, 1, 1, 1)
        recovered = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    torch.testing.assert_close(recovered, clean, atol=2e-4, rtol=1e-3)


@given(configs)
@settings(deadline=None, max_examples=40)
def test_later_times_are_noisier_and_extreme_draws_stay_finite(config):
    u = torch.tensor([0.0, 1e-12, 0.1, 0.4, 0.6, 0.9, 1 - 2**-24])
    clean, noise = torch.ones(7, 1, 1, 1), -torch.ones(7, 1, 1, 1)
    noisy, t, target = example(config, clean, noise, u)
    assert (t.diff() >= 0).all()
    assert (noisy.flatten().diff() <= 0).all()
    assert noisy.isfinite().all()
    assert target.isfinite().all()


def test_alphas_are_those_of_diffusers():
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=DDPM_BETAS[0], beta_end=DDPM_BETAS[1])
    assert torch.equal(ddpm_alphas(), theirs.alphas_cumprod)
    steps = torch.tensor([0, 1, 500, 999])
    clean, noise = latents(0)[:4], latents(1)[:4]
    noisy, t, _ = example(ObjectiveConfig(name="ddpm"), clean, noise, (steps + 0.5) / 1000)
    assert (t * 1000).round().long().tolist() == steps.tolist()
    torch.testing.assert_close(noisy, theirs.add_noise(clean, noise, steps))


def test_ddpm_draws_each_step_alike_often():
    _, t, _ = example(
        ObjectiveConfig(name="ddpm"), torch.zeros(4000, 1, 1, 1), torch.zeros(4000, 1, 1, 1), uniform(4000)
    )
    assert torch.bincount((t * 1000).round().long()).tolist() == [4] * 1000


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_times_have_the_right_logits(mean, std):
    logits = torch.logit(times(uniform(20_000), logit_mean=mean, logit_std=std).double())
    assert logits.mean().item() == pytest.approx(mean, abs=0.01)
    assert logits.std().item() == pytest.approx(std, rel=0.01)


def test_uniform_times_without_shift_are_the_draws_and_a_shift_keeps_the_ends():
    u = torch.linspace(0, 1, 11)
    assert torch.equal(times(u, timesteps="uniform"), u)
    shifted = times(u, timesteps="uniform", shift=3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > u[1:-1]).all()


def test_the_loss_is_a_mean_per_sample():
    target = latents(3)
    prediction = target.clone()
    prediction[5] += 2.0
    loss = make_objective(ObjectiveConfig()).loss(prediction.bfloat16(), target.bfloat16())
    assert loss.dtype == torch.float32
    assert loss[5].item() == pytest.approx(4.0, rel=0.02)
    assert loss.sum() == loss[5]
