"""Sampling for users: nobody is the frozen run, a file is its row, and the user has a scale of its own."""

from dataclasses import replace

import pytest
import torch

from model.common.errors import UserError
from pipeline.diffusion.guidance import Guided
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import choose_sampling_params
from pipeline.inference.users import read_user, save_user
from pipeline.sample import parse
from tests.helpers.tiny_sampler import make_sampler, sampler_with_users

PARAMS = SamplingParams(2, 3.0, 16, 24)
PROMPTS, SEEDS = ["a red cat", "dogs"], [4, 9]


@pytest.fixture(scope="module")
def sampler():
    return sampler_with_users(3)


def latents(sampler, **settings):
    return sampler.latents(PROMPTS, SEEDS, replace(PARAMS, **settings))


def test_nobody_and_user_guidance_zero_are_the_frozen_network(sampler):
    base = latents(make_sampler())
    assert torch.equal(latents(sampler), base)
    # To rounding, since a batch of three branches has other shapes than one of two.
    assert torch.allclose(latents(sampler, user="1", user_guidance=0.0), base, atol=1e-4)
    assert not torch.allclose(latents(sampler, user="1"), base, atol=1e-3)


def test_a_file_is_the_row_that_it_was_made_of(sampler, tmp_path):
    path = tmp_path / "user.safetensors"
    adapter = sampler.network.adapters["users"]
    save_user(path, adapter.table(torch.tensor([2]))[0], of="row 2")
    assert torch.equal(read_user(path), adapter.table(torch.tensor([2]))[0])
    for scale in (None, 2.0):
        named = latents(sampler, user="2", user_guidance=scale)
        assert torch.equal(latents(sampler, user=str(path), user_guidance=scale), named)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_three_branches_are_the_formula(sampler, guidance):
    params = replace(PARAMS, user="1", guidance=guidance)
    condition = sampler.condition(PROMPTS, params)
    null = sampler.condition(["", ""], params)
    noisy = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(0))

    def alone(given, user):
        users = replace(given.users, ids=torch.full((2,), user))
        return Guided(sampler.network, replace(given, users=users), null, 1.0)(noisy, 0.5)

    none, text, both = alone(null, -1), alone(condition, -1), alone(condition, 1)
    ours = Guided(sampler.network, condition, null, guidance, 5.0)
    expected = none + guidance * (text - none) + 5.0 * (both - text)
    assert ours.branches == (2 if guidance == 1.0 else 3)
    assert torch.allclose(ours(noisy, 0.5), expected, atol=1e-5)
    same = Guided(sampler.network, condition, null, guidance, guidance)
    assert same.branches == (1 if guidance == 1.0 else 2)
    assert torch.allclose(same(noisy, 0.5), none + guidance * (both - none), atol=1e-5)


def test_evaluations_count_the_third_branch(sampler):
    assert sampler.evaluations(PARAMS) == 4
    assert sampler.evaluations(replace(PARAMS, user="1")) == 4
    assert sampler.evaluations(replace(PARAMS, user="1", user_guidance=2.0)) == 6


def test_records_name_the_user_only_where_there_is_one():
    assert not {"user", "user_guidance"} & PARAMS.record().keys()
    assert replace(PARAMS, user="1").record()["user"] == "1"


@pytest.mark.parametrize(
    ("user", "message"),
    [("3", "users 0 to 2"), ("anna", "no names here"), ("no.safetensors", "no.safet")],
)
def test_users_that_are_not_there_are_named(sampler, user, message):
    with pytest.raises(UserError, match=message):
        sampler.check(replace(PARAMS, user=user))


def test_a_network_without_users_says_so_and_so_does_a_wrong_file(sampler, tmp_path):
    with pytest.raises(UserError, match="the network has no users"):
        make_sampler().check(replace(PARAMS, user="1"))
    save_user(tmp_path / "other.safetensors", torch.zeros(3, 8))
    with pytest.raises(UserError, match=r"shape \(3, 8\), the adapter reads \(2, 8\)"):
        sampler.check(replace(PARAMS, user=str(tmp_path / "other.safetensors")))
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678" * 4)
    with pytest.raises(UserError, match=r"damaged\.safetensors"):
        sampler.check(replace(PARAMS, user=str(tmp_path / "damaged.safetensors")))


def test_the_command_line_passes_both_options(sampler):
    arguments = parse(["run", "--prompt", "x", "--user", "2", "--user-guidance", "1.5"])
    params = choose_sampling_params(sampler.defaults, arguments)
    assert (params.user, params.user_guidance) == ("2", 1.5)
