"""Sampling with solvers that follow the difficulty of patches, from the command's settings to the records."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from model.common.errors import UserError
from pipeline import diffusers_pipeline
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.diffusion.solvers import initial_noise, make_scheduler
from pipeline.export import build_pipeline
from pipeline.inference.difficulty_maps import (
    MAX_EVALUATIONS,
    MAX_MAPS,
    check_maps,
    difficulty_maps,
    network_inputs,
    show_difficulty,
    show_patches,
)
from pipeline.inference.images import read_settings
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import choose_sampling_params, load_export
from pipeline.sample import SampleImage, parse, write_images
from pipeline.stage.objective import ObjectiveConfig, PatchTimesConfig
from pipeline.stage.sampling import AdaptiveConfig, SamplingConfig
from tests.helpers.tiny_sampler import WIDTHS, LetterLLM, make_sampler, sampler_with_families, with_head


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
        choose_sampling_params(SamplingConfig(), given)
    given = parse(["RUN", "--prompt", "a", "--easy", "0.25"])
    params = choose_sampling_params(SamplingConfig(scheduler="look_ahead"), given)
    assert (params.scheduler, params.adaptive.easy, params.adaptive.ratio) == ("look_ahead", 0.25, 1.4)


def test_difficulty_maps_are_what_the_network_expects():
    sampler = make_sampler()
    with pytest.raises(UserError, match="does not predict that of patches"):
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


@pytest.mark.parametrize("name", ["euler", "dual_loop", "look_ahead"])
def test_the_strip_shows_what_the_network_reads(name):
    sampler = make_sampler()
    sampler.network = with_head(sampler.network)
    params = SamplingParams(4, 3.0, 16, 24, scheduler=name, adaptive=AdaptiveConfig(easy=0.5, inner=2))
    inputs = network_inputs(sampler, "a red cat", 3, params)
    assert torch.equal(inputs[0].latents, initial_noise(sampler.latent_shape(params), [3]))
    assert inputs[0].times == (1.0,)
    assert len(inputs) == (4 if name == "euler" else MAX_EVALUATIONS)
    assert any(len(each.times) == 2 for each in inputs) == (name != "euler")
    assert all(sorted(each.times, reverse=True) == list(each.times) for each in inputs)
    assert not sampler.network._forward_pre_hooks

    strip = show_patches(sampler, "a red cat", 3, params)
    assert strip.width >= len(inputs) // 2 * 24


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


@pytest.fixture
def exported(monkeypatch, tmp_path):
    """A sampler of patch times with its own solver, and the folder of its export."""
    monkeypatch.setattr(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(WIDTHS[family.name]))
    sampler = sampler_with_families()
    sampler.network = with_head(sampler.network)
    sampler.objective.patch_times = PatchTimesConfig("ltg", 4, "cleanest")
    sampler.defaults.scheduler, sampler.defaults.adaptive = "look_ahead", AdaptiveConfig(easy=0.5, ratio=2.0)
    build_pipeline(sampler).save_pretrained(tmp_path / "export")
    return sampler, tmp_path / "export"


@pytest.mark.parametrize("name", ["euler", "dual_loop", "look_ahead"])
def test_an_export_samples_with_the_solver_and_the_text_time_of_the_run(exported, name):
    sampler, folder = exported
    settings = AdaptiveConfig(easy=0.5, ratio=2.0)
    params = SamplingParams(3, 3.0, 16, 24, scheduler=name, adaptive=settings)
    reference = sampler.latents(["a red cat", ""], [4, 9], params)
    loaded = load_export(folder, torch.device("cpu"), torch.float32)
    assert loaded.objective.patch_times == sampler.objective.patch_times
    assert (loaded.defaults.scheduler, loaded.defaults.adaptive) == ("look_ahead", settings)
    # Weights that were loaded lie at other addresses, which changes the last bit of some products.
    close = partial(torch.testing.assert_close, expected=reference, atol=1e-5, rtol=1e-5)
    close(loaded.latents(["a red cat", ""], [4, 9], params))
    loaded.objective.patch_times.text_time = "mean"
    if name != "euler":
        with pytest.raises(AssertionError):
            close(loaded.latents(["a red cat", ""], [4, 9], params))

    pipeline = LIDiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(sampler.latent_shape(params), [4, 9])
    solver = "" if name == "euler" else None if name == "look_ahead" else name
    sampled = pipeline(["a red cat", ""], latents=noise, output_type="latent", solver=solver).images
    close(sampled)


def test_an_export_of_patch_times_refuses_what_reads_one_time(exported):
    _, folder = exported
    pipeline = LIDiTPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="take one of euler, dpm, dual_loop"):
        pipeline("a", solver="heun")
    with pytest.raises(UserError, match="is a scheduler: give it to the pipeline; solvers are dual_loop"):
        pipeline("a", solver="euler")
    pipeline.scheduler = make_scheduler(ObjectiveConfig(), "dpm")
    with pytest.raises(UserError, match=r"take FlowMatchEulerDiscreteScheduler$"):
        pipeline("a", solver="dual_loop")
    with pytest.raises(UserError, match=r"take FlowMatchEulerDiscreteScheduler$"):
        pipeline("a", solver="")
