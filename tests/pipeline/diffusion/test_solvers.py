"""The samplers, driven by perfect predictors of known distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.condition import Condition, Text
from pipeline.diffusion.ddpm import DDPM_STEPS, ddpm_alphas
from pipeline.diffusion.objective import OBJECTIVES
from pipeline.diffusion.solvers import initial_noise, make_scheduler, sample_latents, set_steps
from pipeline.stage.objective import ObjectiveConfig

CPU = torch.device("cpu")
SHAPE = (2, 3, 4)
COMBINATIONS = [
    (objective, name) for objective in ("flow", "ddpm") for name in OBJECTIVES[objective].schedulers
]


def signal_and_noise(objective: ObjectiveConfig, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the clean latents and of the noise is in the noisy ones, each [B, 1, 1, 1]."""
    if objective.name == "flow":
        return (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    alpha = ddpm_alphas()[(t * DDPM_STEPS).round().long()].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def perfect(objective: ObjectiveConfig, std: float):
    """The best predictor where a prompt's images are Gaussian with mean = the value of its only token."""

    def predict(noisy, condition):
        mean = condition.texts[0].states[:, 0, 0].view(-1, 1, 1, 1)
        signal, amount = signal_and_noise(objective, condition.timesteps)
        rest = (noisy - signal * mean) / (signal**2 * std**2 + amount**2)
        clean, noise = mean + signal * std**2 * rest, amount * rest
        return noise - clean if objective.name == "flow" else noise

    return predict


def prompts(*values: float) -> Condition:
    text = Text(torch.tensor(values).view(-1, 1, 1), torch.ones(len(values), 1, dtype=torch.bool), 0)
    return Condition(torch.zeros(len(values)), [text])


def run(objective, scheduler, values, nulls, seeds, steps=25, guidance=1.0, std=0.0, shape=SHAPE):
    predict = perfect(objective, std)
    condition, null_condition = prompts(*values), prompts(*nulls)
    return sample_latents(
        predict, make_scheduler(objective, scheduler), condition, null_condition, shape, seeds, steps,
        guidance, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "scheduler"), COMBINATIONS)
@given(shift=st.floats(1, 4), guidance=st.floats(1, 7), steps=st.integers(2, 30), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=8)
def test_a_single_possible_image_is_reached_and_guidance_extrapolates(
    name, scheduler, shift, guidance, steps, seed
):
    objective = ObjectiveConfig(name=name, shift=shift)
    images = run(objective, scheduler, [1.0, -0.5], [0.25, 0.25], [seed, seed + 1], steps, guidance)
    expected = (
        torch.tensor([0.25 + guidance * 0.75, 0.25 - guidance * 0.75]).view(2, 1, 1, 1).expand_as(images)
    )
    torch.testing.assert_close(images, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("name", "scheduler"), COMBINATIONS)
def test_a_gaussian_is_sampled_with_its_mean_and_spread(name, scheduler):
    images = run(
        ObjectiveConfig(name=name), scheduler, [0.7], [0.0], [3], steps=100, std=0.5, shape=(4, 50, 50)
    )
    assert images.mean().item() == pytest.approx(0.7, abs=0.03)
    assert images.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("name", "scheduler"), COMBINATIONS)
def test_an_image_depends_on_its_seed_alone_and_not_on_the_batch(name, scheduler):
    objective = ObjectiveConfig(name=name)
    batch = run(objective, scheduler, [0.1, 0.2, 0.3], [0.0] * 3, [7, 8, 9], guidance=3.0, std=0.5)
    alone = run(objective, scheduler, [0.3], [0.0], [9], guidance=3.0, std=0.5)
    assert torch.equal(batch[2:], alone)
    again = run(objective, scheduler, [0.3], [0.0], [10], guidance=3.0, std=0.5)
    assert not torch.allclose(alone, again)


@pytest.mark.parametrize(("name", "scheduler"), COMBINATIONS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_computed_together_are_the_same_up_to_rounding(name, scheduler, guidance):
    objective, sizes = ObjectiveConfig(name=name), set()

    def predict(noisy, condition):
        sizes.add((len(noisy), len(condition.timesteps)))
        # as the network does: the branches of guidance share the latents
        noisy = noisy.repeat(len(condition.timesteps) // len(noisy), 1, 1, 1)
        return perfect(objective, 0.5)(noisy, condition)

    def sample(together):
        return sample_latents(
            predict, make_scheduler(objective, scheduler), prompts(0.1, 0.2, 0.3), prompts(0.0, 0.0, 0.0),
            SHAPE, [7, 8, 9], 5, guidance, torch.float32, together=together,
        )  # fmt: skip

    branches = 1 if guidance == 1.0 else 2
    alone = sample(False)
    assert sizes == {(1, branches)}
    sizes.clear()
    torch.testing.assert_close(sample(True), alone)
    assert sizes == {(3, 3 * branches)}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", OBJECTIVES["flow"].schedulers)
def test_flow_times_are_shifted_once_and_end_before_zero(scheduler, shift):
    times = [time for _, time in set_steps(make_scheduler(ObjectiveConfig(shift=shift), scheduler), 10, CPU)]
    even = [1 - i / 10 for i in range(10)]
    assert times == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in even], abs=0.01)


def test_ddpm_times_are_whole_steps_from_the_noisiest():
    times = [time for _, time in set_steps(make_scheduler(ObjectiveConfig(name="ddpm")), 20, CPU)]
    assert times[0] == pytest.approx(0.999)
    assert all(math.isclose(time * 1000, round(time * 1000), abs_tol=1e-3) for time in times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_network_sees_the_low_precision(dtype):
    seen, steps = [], []

    def predict(noisy, condition):
        seen.append((noisy.dtype, condition.timesteps.dtype, len(noisy), condition.texts[0].states.shape[0]))
        return torch.zeros(len(condition.timesteps), *noisy.shape[1:], dtype=noisy.dtype)

    def on_step(step, latents):
        steps.append(step)
        return latents

    latents = sample_latents(
        predict, make_scheduler(ObjectiveConfig()), prompts(1.0), prompts(0.0), SHAPE, [1], 3, 2.0, dtype,
        on_step,
    )  # fmt: skip
    assert latents.dtype == torch.float32
    assert seen == [(dtype, torch.float32, 1, 2)] * 3  # the branches of guidance share the latents
    assert steps == [1, 2, 3]


@given(st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None, max_examples=10)
def test_stacked_texts_keep_their_tokens_and_mask_the_rest(long, short):
    first = Text(torch.randn(2, long, 3), torch.ones(2, long, dtype=torch.bool), 1, padded=False)
    second = Text(torch.randn(1, short, 3), torch.ones(1, short, dtype=torch.bool), 1, padded=False)
    both = Text.concatenate([first, second])
    assert both.mask.sum(1).tolist() == [long, long, short]
    assert torch.equal(both.states[:2, :long], first.states)
    assert torch.equal(both.states[2:, :short], second.states)
    assert both.prefix == 1
    assert both.padded == (long != short)


def test_noise_is_the_same_for_a_seed_in_any_place():
    assert torch.equal(initial_noise(SHAPE, [5, 6])[1], initial_noise(SHAPE, [6])[0])


@pytest.mark.parametrize(("name", "scheduler"), [("flow", "ddim"), ("ddpm", "euler"), ("flow", "nonsense")])
def test_a_scheduler_that_does_not_fit_is_refused(name, scheduler):
    with pytest.raises(UserError, match="take one of"):
        make_scheduler(ObjectiveConfig(name=name), scheduler)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(UserError, match="between 1 and 1000"):
        set_steps(make_scheduler(ObjectiveConfig()), steps, CPU)
