"""Times that differ from patch to patch: their distribution, and what they keep equal."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.ablation.rows import PAPER_ROWS, read_ablation
from pipeline.data.noise import sample_noise
from pipeline.diffusion.objective import make_objective
from pipeline.diffusion.patch_times import quantiles, share_below, times_of_levels
from pipeline.stage.config import load_stage
from pipeline.stage.objective import ObjectiveConfig, PatchTimesConfig

CPU = torch.device("cpu")
SHAPE = (3, 4, 6)
few = settings(max_examples=15, deadline=None)


def ltg(levels=16, text_time="mean", **config):
    patch_times = PatchTimesConfig("ltg", levels, text_time)
    return ObjectiveConfig(patch_times=patch_times, **config)


def example(config, ids=(0, 1, 2), seed=0, epoch=0, patch=(2, 2)):
    keys = [(seed, epoch, id) for id in ids]
    clean, noise = (
        sample_noise(CPU, (len(ids), *SHAPE), keys, stream) for stream in ("posterior_noise", "noise")
    )
    u = (torch.tensor(ids) + 0.5) / 10
    normal = lambda stream, shape: sample_noise(CPU, (len(ids), *shape), keys, stream)  # noqa: E731
    return clean, noise, u, make_objective(config, patch).training_example(clean, noise, u, normal)


def drawn_shares(count=200_000):
    """Numbers r as the paper draws them, patch by patch."""
    rng = torch.Generator().manual_seed(0)
    r = 1 - torch.randn(count, generator=rng).abs() / 2
    return torch.where(r < 0, torch.rand(count, generator=rng), r)


def test_the_distribution_is_the_papers():
    drawn = drawn_shares().sort().values
    for r in (0.05, 0.2, 0.5, 0.8, 0.95):
        assert share_below(r) == pytest.approx((drawn < r).float().mean().item(), abs=0.004)
    assert (share_below(0.0), share_below(1.0)) == (pytest.approx(0), pytest.approx(1))
    assert sum(quantiles(500)) / 500 == pytest.approx(drawn.mean().item(), abs=2e-3)


@given(st.integers(1, 64))
@few
def test_levels_are_quantiles(levels):
    found = quantiles(levels)
    assert list(found) == sorted(set(found))
    for level, r in enumerate(found):
        assert share_below(r) == pytest.approx((level + 0.5) / levels, abs=1e-9)


@given(st.integers(2, 32), st.floats(0.2, 5), st.floats(-1, 1))
@few
def test_no_patch_is_cleaner_than_the_cleanest_and_none_beyond_noise(levels, shift, mean):
    config = ltg(levels, shift=shift, logit_mean=mean)
    _, _, u, made = example(config)
    shared = ObjectiveConfig(shift=shift, logit_mean=mean)
    cleanest = make_objective(shared).sample_timesteps(u)
    assert made.timesteps.shape == (3, levels)
    assert (made.timesteps >= cleanest[:, None] - 1e-6).all()
    assert (made.timesteps <= 1).all()
    assert (made.timesteps.diff(dim=1) < 1e-7).all()
    assert made.levels.places.shape == (3, 6)
    assert 0 <= made.levels.places.min() <= made.levels.places.max() < levels


def test_the_shift_acts_on_each_time():
    plain, shifted = example(ltg())[3], example(ltg(shift=3.0))[3]
    t = plain.timesteps
    torch.testing.assert_close(shifted.timesteps, 3 * t / (1 + 2 * t))
    assert torch.equal(plain.levels.places, shifted.levels.places)


def test_each_patch_is_mixed_at_its_own_time():
    clean, noise, _, made = example(ltg())
    of_patches = made.timesteps.gather(1, made.levels.places).view(3, 1, 2, 3)
    mix = of_patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(made.noisy, (1 - mix) * clean + mix * noise)
    assert torch.equal(made.target, noise - clean)


def test_the_text_side_reads_the_mean_or_the_cleanest_time():
    mean, cleanest = example(ltg())[3], example(ltg(text_time="cleanest"))[3]
    of_patches = mean.timesteps.gather(1, mean.levels.places)
    torch.testing.assert_close(mean.levels.sample_times, of_patches.mean(1))
    assert torch.equal(cleanest.levels.sample_times, of_patches.min(1).values)


def test_one_level_is_the_shared_time_bit_for_bit():
    one, shared = example(ltg(1))[3], example(ObjectiveConfig())[3]
    assert torch.equal(one.noisy, shared.noisy)
    assert torch.equal(one.timesteps, shared.timesteps)
    assert one.levels is None


def test_a_sample_has_its_places_in_any_batch():
    whole, alone = example(ltg())[3], example(ltg(), ids=(2,))[3]
    assert torch.equal(whole.levels.places[2:], alone.levels.places)
    assert torch.equal(whole.timesteps[2:], alone.timesteps)
    assert torch.equal(whole.noisy[2:], alone.noisy)
    other = example(ltg(), epoch=1)[3]
    assert not torch.equal(whole.levels.places, other.levels.places)


def test_all_levels_are_equally_likely():
    keys = [(0, 0, id) for id in range(200)]
    normal = lambda stream, shape: sample_noise(CPU, (200, *shape), keys, stream)  # noqa: E731
    latents = torch.zeros(200, 1, 16, 16)
    made = make_objective(ltg(8)).training_example(latents, latents, torch.rand(200), normal)
    counts = made.levels.places.flatten().bincount(minlength=8)
    expected = 200 * 256 / 8
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_times_of_one_level_per_sample_are_in_the_middle():
    assert times_of_levels(torch.tensor([0.0]), 1).item() == pytest.approx(1 - quantiles(1)[0])


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        (["objective.name=ddpm", "objective.patch_times.kind=ltg"], "objective.name=ddpm has one time"),
        (["objective.patch_times.levels=0"], "objective.patch_times.levels=0: set a number from 1"),
        (["objective.patch_times.kind=lgt"], "objective.patch_times.kind"),
        (["objective.difficulty=-1"], "objective.difficulty=-1"),
    ],
)
def test_wrong_settings_are_one_line(settings_, says):
    with pytest.raises(UserError, match=says) as refused:
        make_objective(load_stage("demo", settings_).objective)
    assert "\n" not in str(refused.value)


def test_a_stage_gives_its_network_levels_and_head():
    plain = load_stage("demo").dit(16)
    assert (plain.time_levels, plain.difficulty) == (1, "none")
    on = ["objective.patch_times.kind=ltg", "objective.difficulty=0.01"]
    assert load_stage("demo", on).dit(16).time_levels == 16
    assert load_stage("demo", on).dit(16).difficulty == "attached"
    assert load_stage("demo", [*on, "model.difficulty=detached"]).dit(16).difficulty == "detached"


@pytest.mark.parametrize("stage", ["patch_times_ablation", "scenes_ablation"])
def test_the_shipped_rows_differ_in_the_objective_alone(stage):
    rows = read_ablation(PAPER_ROWS.with_name("patch_times.yaml"), [], []).rows
    stages = {name: load_stage(stage, row.settings) for name, row in rows.items()}
    base = stages["shared"]
    assert all(replace(each, objective=base.objective) == base for each in stages.values())
    levels = {name: each.dit(16).time_levels for name, each in stages.items()}
    assert levels == {"shared": 1, "shared_noisier": 1, "ltg": 16, "ltg_difficulty": 16}
    assert stages["shared_noisier"].objective.logit_mean == 0.6
    assert [each.dit(16).difficulty for each in stages.values()] == ["none", "none", "none", "attached"]


def test_the_fair_baseline_is_as_noisy_as_the_mean_patch():
    u = (torch.arange(4000) + 0.5) / 4000
    normal = lambda stream, shape: torch.zeros(4000, *shape)  # noqa: E731
    latents = torch.zeros(4000, 1, 2, 2)
    made = make_objective(ltg(64, logit_mean=-0.5)).training_example(latents, latents, u, normal)
    baseline = make_objective(ObjectiveConfig(logit_mean=0.6)).sample_timesteps(u)
    assert made.timesteps.mean().item() == pytest.approx(baseline.mean().item(), abs=0.01)


def test_the_shipped_stage_is_the_1b_stage_with_patch_times():
    ours, plain = load_stage("li_dit_1b_256_patch_times"), load_stage("li_dit_1b_256")
    assert replace(
        ours, name=plain.name, objective=plain.objective,
        engine=replace(ours.engine, micro_batch=plain.engine.micro_batch),
    ) == plain  # fmt: skip
    assert (ours.dit(16).time_levels, ours.dit(16).difficulty) == (16, "attached")
