"""Solvers that follow the difficulty of patches: where they are Euler's method bit for bit, and what they
count."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from model.common.errors import UserError
from model.condition import Condition
from model.functional import fill_patches, patchify
from pipeline.diffusion.solvers import (
    count_evaluations,
    initial_noise,
    make_scheduler,
    sample_latents,
    set_steps,
)
from pipeline.stage.objective import ObjectiveConfig, PatchTimesConfig
from pipeline.stage.sampling import AdaptiveConfig
from tests.helpers.networks import SMALL, random_inputs, random_network

SHAPE = (SMALL.channels, 4, 6)
PATCH = (2, 2)
SEEDS = [3, 8]
FLOW = ObjectiveConfig(shift=1.5, patch_times=PatchTimesConfig("ltg", 8))
SIZES = replace(SMALL, difficulty="attached")


@pytest.fixture(scope="module")
def network():
    made = random_network(difficulty="attached").float().eval().requires_grad_(False)
    made.final.difficulty.linear.weight *= 0.1
    return made


def conditions(count=2):
    _, _, texts = random_inputs(lengths=(4, 2), seed=0)
    _, _, nulls = random_inputs(lengths=(1, 1), seed=7)
    made = []
    for given in (texts, nulls):
        one = Condition(torch.zeros(2), [replace(text, states=text.states.float()) for text in given])
        made.append(one.rows(slice(0, count)))
    return made


class Watched:
    """The network, with the times and latents of each evaluation."""

    def __init__(self, network):
        self.network, self.times, self.levels, self.latents = network, [], [], []

    def __call__(self, latents, condition):
        self.times.append(condition.timesteps.clone())
        self.levels.append(condition.levels)
        self.latents.append(latents.clone())
        return self.network(latents, condition)


def sample(predict, name="euler", steps=3, guidance=3.0, count=2, on_step=None, sizes=SIZES, **settings):
    solver = make_scheduler(FLOW, name, AdaptiveConfig(**settings), sizes)
    return sample_latents(
        predict, solver, *conditions(count), SHAPE, SEEDS[:count], steps, guidance, torch.float32, on_step
    )  # fmt: skip


def euler_on(times, network, guidance=3.0):
    """Euler's method on given times, by hand."""
    condition, null = conditions(1)
    both = Condition.concatenate([condition.row(0), null.row(0)])
    latents = initial_noise(SHAPE, SEEDS[:1])
    for now, then in pairwise(times):
        with_text, without = network(latents, both.at(now.item())).chunk(2)
        latents = latents + (then - now) * (without + guidance * (with_text - without))
    return latents


def edges(steps):
    """Times of Euler's steps and the end."""
    scheduler = make_scheduler(FLOW, "euler")
    set_steps(scheduler, steps, torch.device("cpu"))
    return scheduler.sigmas


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dual_loop", {"inner": 1}),
        ("dual_loop", {"easy": 1.0}),
        ("look_ahead", {"ratio": 1.0, "unguided": 2.0}),
        ("look_ahead", {"easy": 1.0, "unguided": 2.0}),
    ],
)
def test_it_degenerates_to_euler_bit_for_bit(network, name, settings):
    assert torch.equal(sample(network, name, **settings), sample(network))


def test_all_patches_hard_is_euler_on_the_fine_grid_bit_for_bit(network):
    coarse = edges(2)
    fine = [start + (end - start) * (j / 4) for start, end in pairwise(coarse) for j in range(4)]
    expected = euler_on([*fine, coarse[-1]], network)
    assert torch.equal(sample(network, "dual_loop", steps=2, count=1, easy=0.0, inner=4), expected)


def test_equal_difficulties_are_all_hard(network):
    plain = random_network(difficulty="attached").float().eval().requires_grad_(False)
    plain.final.difficulty.linear.reset_parameters()
    ties = sample(plain, "dual_loop", steps=2, count=1, easy=0.4, inner=4)
    assert torch.equal(ties, sample(plain, "dual_loop", steps=2, count=1, easy=0.0, inner=4))


def test_the_inner_loop_moves_the_hard_patches_alone(network):
    watched = Watched(network)
    ends = []
    keep = lambda step, latents: ends.append(latents) or latents  # noqa: E731
    sample(watched, "dual_loop", steps=2, count=1, easy=0.5, on_step=keep)
    assert len(watched.times) == 2 * 4
    for step, (_start, end) in enumerate(pairwise(edges(2))):
        inside = range(4 * step + 1, 4 * step + 4)
        places = watched.levels[inside[0]].places[0]
        assert places.sum() == 3  # of 6 patches
        easy = fill_patches(places[None] == 0, PATCH, SHAPE[1:]).expand(1, *SHAPE)
        for evaluation in inside:
            assert torch.equal(watched.latents[evaluation][easy], ends[step][easy])
            assert torch.equal(watched.times[evaluation][:, 0], end.expand(2))
            assert (watched.times[evaluation][:, 1] > end).all()
        hard = [watched.latents[evaluation][~easy] for evaluation in inside]
        assert not torch.equal(hard[0], hard[1])


def test_look_ahead_keeps_one_time_and_shows_the_easy_patches_further_on(network):
    watched = Watched(network)
    sample(watched, "look_ahead", steps=3, count=1, easy=0.5, ratio=1.4, unguided=0.9)
    # In the first step all is noise: the second evaluation is at the same time, and there is no guidance.
    assert [len(times) for times in watched.times] == [1, 1, 2, 2, 2, 2]
    for step, now in enumerate(edges(3)[1:3], start=1):
        first, second = watched.times[2 * step], watched.times[2 * step + 1]
        assert torch.equal(first, now.expand(2))
        ahead = max(0.0, 1 - 1.4 * (1 - now.item()))
        assert second[0].tolist() == pytest.approx([ahead, now.item()])
        context, real = watched.latents[2 * step + 1], watched.latents[2 * step]
        moved = (patchify(context, PATCH) != patchify(real, PATCH)).any(-1)
        assert torch.equal(moved, watched.levels[2 * step + 1].places[:1] == 0)


@pytest.mark.parametrize("name", ["euler", "dual_loop", "look_ahead"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_are_counted(network, name, guidance):
    watched, settings = Watched(network), {"easy": 0.5, "inner": 3, "unguided": 0.9}
    sample(watched, name, steps=4, guidance=guidance, count=1, **settings)
    solver = make_scheduler(FLOW, name, AdaptiveConfig(**settings), SIZES)
    assert count_evaluations(solver, 4, guidance) == sum(len(times) for times in watched.times)


@pytest.mark.parametrize("name", ["dual_loop", "look_ahead"])
def test_an_image_does_not_depend_on_its_batch(network, name):
    assert torch.equal(sample(network, name)[:1], sample(network, name, count=1))
    assert not torch.equal(sample(network, name), sample(network))


def test_the_text_side_reads_the_time_of_training(network):
    watched = Watched(network)
    sample(watched, "dual_loop", steps=1, count=1, easy=0.5)
    levels, times = watched.levels[1], watched.times[1]
    torch.testing.assert_close(levels.sample_times, times.mean(1))  # half of the patches are easy


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("dual_loop", SMALL, "this network does not predict: train with objective.difficulty"),
        ("look_ahead", None, "this network does not predict"),
        ("dpm", SIZES, "trained with objective.patch_times: take euler"),
        ("nonsense", SIZES, "take one of euler, dpm, dual_loop, look_ahead"),
    ],
)
def test_what_does_not_fit_is_one_line(name, sizes, says):
    with pytest.raises(UserError, match=says) as refused:
        make_scheduler(FLOW, name, None, sizes)
    assert "\n" not in str(refused.value)


def test_ddpm_has_none():
    with pytest.raises(UserError, match="take one of dpm, ddim"):
        make_scheduler(ObjectiveConfig(name="ddpm"), "dual_loop", None, SIZES)
