"""Sampling with solvers that follow the difficulty of patches, from the command's settings to the records."""

from dataclasses import replace

import pytest
import torch

from model.common.errors import UserError
from model.dit import LIDiT
from pipeline.diffusion.solvers import initial_noise
from pipeline.inference.difficulty_maps import MAX_MAPS, check_maps, difficulty_maps, show_difficulty
from pipeline.inference.images import read_settings
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import choose_sampling_params
from pipeline.sample import SampleImage, parse, write_images
from pipeline.stage.config import AdaptiveConfig, SampleConfig
from tests.helpers.tiny_sampler import WIDTHS, make_sampler


def with_head(network):
    """A copy with a head of random weights."""
    sizes = replace(network.sizes, difficulty="attached")
    made = LIDiT(sizes, network.fusion.config, list(WIDTHS.values()))
    made.load_state_dict(network.state_dict(), strict=False)
    torch.nn.init.normal_(made.final.difficulty.linear.weight)
    return made.eval().requires_grad_(False)


def test_solvers_of_patches_are_sampled_recorded_and_refused_without_a_head(tmp_path):
    sampler = make_sampler()
    params = SamplingParams(3, 3.0, 16, 24, scheduler="dual_loop", adaptive=AdaptiveConfig(easy=0.5, inner=2))
    with pytest.raises(UserError, match="this network does not predict"):
        sampler.check(params)

    sampler.network = with_head(sampler.network)
    sampler.check(params)
    images = [SampleImage(f"{seed}.png", "a red cat", seed) for seed in (1, 2)]
    records = write_images(sampler, images, params, 2, tmp_path, {}, shows=False)
    assert [record["evaluations"] for record in records] == [3 * 2 * 2] * 2
    assert records[0]["adaptive"] == {"easy": 0.5, "inner": 2, "ratio": 1.4, "unguided": 0.95}
    plain = write_images(sampler, images, replace(params, scheduler=""), 2, tmp_path, {}, shows=False)
    assert "adaptive" not in plain[0]
    assert plain[0]["evaluations"] == 3 * 2
    assert read_settings(tmp_path / "1.png")["evaluations"] == 3 * 2


def test_numbers_of_solvers_out_of_range_are_one_line():
    given = parse(["RUN", "--prompt", "a", "--scheduler", "look_ahead", "--ratio", "0.5"])
    with pytest.raises(UserError, match=r"--ratio 0.5: give a number from 1"):
        choose_sampling_params(SampleConfig(), given)
    given = parse(["RUN", "--prompt", "a", "--easy", "0.25"])
    params = choose_sampling_params(SampleConfig(scheduler="look_ahead"), given)
    assert (params.scheduler, params.adaptive.easy, params.adaptive.ratio) == ("look_ahead", 0.25, 1.4)


def test_difficulty_maps_are_what_the_network_expects():
    sampler = make_sampler()
    with pytest.raises(UserError, match="does not predict the difficulty"):
        check_maps(sampler)
    sampler.network = with_head(sampler.network)
    check_maps(sampler)

    params = SamplingParams(7, 3.0, 16, 24)
    latents, maps = difficulty_maps(sampler, "a red cat", 3, params)
    assert torch.equal(latents, sampler.latents(["a red cat"], [3], params))
    assert len(maps) == MAX_MAPS
    assert [each.time for each in maps] == sorted((each.time for each in maps), reverse=True)
    condition = replace(sampler.condition(["a red cat"], params), with_difficulty=True).at(1.0)
    noise = initial_noise(sampler.latent_shape(params), [3])
    # patches of one position: the map is the channel itself
    assert torch.equal(maps[0].log_variance, sampler.network(noise, condition)[0, -1])
    assert maps[0].time == 1.0

    shown = show_difficulty(sampler, "a red cat", 3, replace(params, steps=1))
    assert shown.width > 2 * 24


def test_the_schedulers_that_are_offered_can_be_taken():
    sampler, ddpm = make_sampler(), make_sampler("ddpm")
    assert sampler.schedulers == ["euler", "dpm"]
    sampler.network, ddpm.network = with_head(sampler.network), with_head(ddpm.network)
    assert sampler.schedulers == ["euler", "dpm", "dual_loop", "look_ahead"]
    sampler.objective.patch_times.kind = "ltg"
    assert sampler.schedulers == ["euler", "dual_loop", "look_ahead"]
    for each in (sampler, ddpm):
        for name in each.schedulers:
            each.check(SamplingParams(2, 3.0, 16, 24, scheduler=name))
