"""The pipeline's call keeps the contract of diffusers' pipelines; each wrong argument is one line."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.callbacks import PipelineCallback
from diffusers.hooks import apply_group_offloading
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.condition import Condition
from pipeline import diffusers_pipeline
from pipeline.diffusers_pipeline import LIDiTPipeline, LIDiTText
from pipeline.export import build_pipeline
from pipeline.inference.call import make_noise
from tests.helpers.tiny_sampler import CPU, WIDTHS, LetterLLM, sampler_with_families

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(WIDTHS[family.name]))


@pytest.fixture(scope="module")
def built():
    pipeline = build_pipeline(sampler_with_families())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(built):
    return copy.deepcopy(built)


def draw(pipeline, prompt="tea", **options):
    """Return the latents of a call."""
    if "generator" not in options and "latents" not in options:
        options = {"seed": 1, **options}
    return pipeline(prompt, output_type="latent", **options).images


def test_none_an_empty_text_and_a_list_of_it_are_the_null_caption(pipeline):
    plain = draw(pipeline)
    for negative in (None, "", [""], [" "]):
        assert torch.equal(draw(pipeline, negative_prompt=negative), plain)


def test_each_prompt_has_its_own_negative_prompt(pipeline):
    both = draw(pipeline, ["tea", "a cup"], negative_prompt=["bad", ""], num_images_per_prompt=2)
    first = draw(pipeline, "tea", negative_prompt=["bad"], num_images_per_prompt=2)
    second = draw(pipeline, ["a cup"], num_images_per_prompt=2)
    assert torch.equal(both, torch.cat([first, second]))
    assert not torch.equal(first, draw(pipeline, "tea", num_images_per_prompt=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedded_prompts_draw_the_same_without_the_text_part(pipeline, dtype):
    pipeline.to(dtype=dtype)
    prompts, negatives = ["tea", "two dogs"], ["bad", ""]
    whole = draw(pipeline, prompts, negative_prompt=negatives, num_images_per_prompt=2)
    alone = LIDiTPipeline(None, None, None, pipeline.text)
    positive, negative = alone.encode_prompt(prompts, negatives)
    parts = {name: part for name, part in pipeline.components.items() if name != "text"}
    config = {key: pipeline.config[key] for key in ("height", "width", "steps", "guidance")}
    without = LIDiTPipeline(text=None, **parts, **config)
    without.set_progress_bar_config(disable=True)
    options = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "num_images_per_prompt": 2}
    assert torch.equal(draw(without, None, **options), whole)
    with pytest.raises(UserError, match="no text part"):
        draw(without)
    # with the text part, the null caption need not be given
    assert torch.equal(draw(pipeline, None, prompt_embeds=positive), draw(pipeline, prompts))


def test_prompts_and_negative_prompts_load_each_llm_once(pipeline, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        diffusers_pipeline,
        "load_llm",
        lambda family, device: loaded.append(family.name) or LetterLLM(WIDTHS[family.name]),
    )
    for keep in (False, True):
        pipeline.text._reader = None
        pipeline.text(["tea"], ["bad"], keep_llms=keep)
        assert sorted(loaded) == sorted(WIDTHS)
        assert bool(pipeline.text.reader.llms) == keep
        loaded.clear()


def test_a_callback_gets_and_returns_the_tensors_that_it_names(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, pipe.num_timesteps, sorted(tensors)))
        last = step == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    names = LIDiTPipeline._callback_tensor_inputs
    latents = draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=list(names))
    assert seen == [(step, 3, ["latents"]) for step in range(3)]
    assert not latents.any()
    draw(
        pipeline,
        callback_on_step_end=lambda *given: seen.append(given[3]),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen[3:] == [{}] * 3


def test_a_callback_class_of_diffusers_says_what_it_reads(pipeline):
    class Zero(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0}

    assert not draw(pipeline, callback_on_step_end=Zero(cutoff_step_ratio=None, cutoff_step_index=2)).any()


def test_a_callback_stops_the_call_and_the_next_call_starts_anew(pipeline):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    draw(pipeline, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert pipeline.interrupt
    plain = draw(pipeline)
    assert not pipeline.interrupt
    assert torch.equal(plain, draw(pipeline))


def test_a_callback_changes_the_guidance_of_the_next_steps(pipeline):
    def more(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    changed = draw(pipeline, guidance_scale=2.0, callback_on_step_end=more)
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps
    assert not torch.equal(changed, draw(pipeline, guidance_scale=2.0))

    def off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0

    draw(pipeline, guidance_scale=2.0, callback_on_step_end=off)
    assert not pipeline.do_classifier_free_guidance


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_schedule_that_is_given_is_followed(objective):
    pipeline = build_pipeline(sampler_with_families(objective))
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, num_inference_steps=4)
    if objective == "flow":
        assert torch.equal(draw(pipeline, sigmas=[1.0, 0.75, 0.5, 0.25]), plain)
        assert torch.equal(draw(pipeline, sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4), plain)
        torch.testing.assert_close(draw(pipeline, timesteps=[1000, 750, 500, 250]), plain)
        assert not torch.equal(draw(pipeline, sigmas=[1.0, 0.7, 0.5, 0.25]), plain)
    else:
        own = pipeline.scheduler.timesteps.tolist()
        assert torch.equal(draw(pipeline, timesteps=own), plain)
        assert not torch.equal(draw(pipeline, timesteps=[900, *own[1:]]), plain)
        with pytest.raises(UserError, match="sigmas=: DPMSolverMultistepScheduler takes none here"):
            draw(pipeline, sigmas=[1.0, 0.5])
        with pytest.raises(UserError, match="timesteps=: give at most 1000 falling numbers, none above 999"):
            draw(pipeline, timesteps=[1000, 500])
    seen = []
    draw(
        pipeline, timesteps=[800, 300], callback_on_step_end=lambda *given: seen.append(float(given[2])) or {}
    )
    assert (seen, pipeline.num_timesteps) == ([800, 300], 2)


def test_flow_sigmas_of_the_multistep_scheduler_cannot_be_given(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **FLOW)
    for name in ("sigmas", "timesteps"):
        with pytest.raises(UserError, match=f"{name}=: DPMSolverMultistepScheduler takes none here"):
            draw(pipeline, **{name: [0.9, 0.5]})


def test_empty_arguments_of_attention_processors_mean_none(pipeline):
    plain = draw(pipeline)
    assert torch.equal(draw(pipeline, cross_attention_kwargs=None, attention_kwargs={}), plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigmas": [1.0], "timesteps": [500]}, "sigmas= beside timesteps=: each decides"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps=3 beside 2 sigmas"),
        ({"sigmas": []}, "sigmas=: give at most 1000 falling numbers, none above 1"),
        ({"sigmas": [0.5, 0.7]}, "sigmas=: give at most 1000 falling"),
        ({"sigmas": [0.5, 0.5]}, "sigmas=: give at most 1000 falling"),
        ({"sigmas": [2.0, 0.5]}, "none above 1 or below 0"),
        ({"sigmas": [float("nan"), 0.5]}, "none above 1 or below 0"),
        ({"sigmas": [0.5, 0.0]}, "sigmas=: give at most 1000 falling"),
        ({"timesteps": [1001, 5]}, "timesteps=: give at most 1000 falling numbers, none above 1000"),
        ({"timesteps": [5, -1]}, "none above 1000 or below 0"),
        ({"cross_attention_kwargs": {"scale": 1.0}}, "cross_attention_kwargs=: the network has no attention"),
        ({"attention_kwargs": {"scale": 1.0}}, "attention_kwargs=: the network has no attention"),
        ({"prompt": []}, r"prompt=\[\]: give a text"),
        ({"prompt": None}, "prompt=None: give a text"),
        ({"prompt": ["tea", 3]}, "give a text"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: give a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: give"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: give"),
        ({"num_inference_steps": 1001}, "between 1 and 1000"),
        ({"height": 0}, "height=0: give"),
        ({"width": -8}, "width=-8: give"),
        ({"height": 10}, "multiple of"),
        ({"latents": torch.zeros(2, 16, 2, 3)}, r"latents of shape \[2, 16, 2, 3\].*\[1, 16, 2, 3\]"),
        ({"latents": torch.zeros(1, 16, 4, 4)}, r"latents of shape \[1, 16, 4, 4\]"),
        ({"seed": 1, "generator": torch.Generator()}, "seed= beside generator="),
        ({"seed": 1, "latents": torch.zeros(1, 16, 2, 3)}, "seed= beside generator= or latents="),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "2 texts for 1 prompts"),
        ({"negative_prompt": 7}, "negative_prompt=7: give a text"),
        ({"prompt_embeds": torch.zeros(1, 4, 8)}, "prompt_embeds: Tensor is not what encode_prompt returns"),
        ({"prompt_embeds": []}, "prompt_embeds: list is not"),
        ({"output_type": "gif"}, "take one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "'prompt_embeds' is not one of latents"),
        ({"prompt": "x" * 99}, "longer than"),
    ],
)
def test_a_wrong_argument_is_one_line(pipeline, wrong, message):
    with pytest.raises(UserError, match=message) as error:
        pipeline(**{"prompt": None if "prompt_embeds" in wrong else "tea", **wrong})
    assert "\n" not in str(error.value)


def test_two_forms_of_a_prompt_are_refused(pipeline):
    positive, negative = pipeline.encode_prompt(["tea", "cup"])
    for wrong in (
        {"prompt": "tea", "prompt_embeds": positive},
        {"prompt": "tea", "negative_prompt": "a", "negative_prompt_embeds": negative},
        {"prompt": "tea", "negative_prompt_embeds": negative},  # two for one prompt
    ):
        with pytest.raises(UserError, match=r"beside|2 prompts, not 1"):
            pipeline(**wrong)


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 3), per_prompt=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_every_source_of_noise_gives_what_it_gave_before(images, per_prompt, seed):
    shape, count = (2, 2, 3), images * per_prompt
    from_seed = make_noise(shape, count, per_prompt, None, seed, None)
    numbers = [seed + number % per_prompt for number in range(count)]
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    assert torch.equal(make_noise(shape, count, per_prompt, generators, None, None), from_seed)
    assert make_noise(shape, count, per_prompt, None, None, from_seed) is from_seed


def test_a_model_answers_as_diffusers_models_do(pipeline):
    condition = Condition(torch.zeros(1), pipeline.encode_prompt("tea")[0])
    latents = torch.randn(1, 16, 2, 3)
    network = pipeline.transformer
    output = network(latents, condition)
    assert torch.equal(output.sample, network(latents, condition, return_dict=False)[0])
    assert torch.equal(output.sample, super(type(network), network).forward(latents, condition))


def test_the_switch_for_checkpointing_recomputes_every_block(pipeline):
    network = pipeline.transformer.train().requires_grad_(True)
    condition = Condition(torch.full((1,), 0.5), pipeline.encode_prompt("tea")[0])
    latents = torch.randn(1, 16, 2, 3)

    def gradients():
        network.zero_grad()
        network(latents, condition).sample.square().sum().backward()
        return [parameter.grad for parameter in network.parameters()]

    plain = gradients()
    recomputed = []

    def count(block, *inputs):
        recomputed.append(block)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    network.enable_gradient_checkpointing(count)
    assert network.is_gradient_checkpointing
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), plain, strict=True))
    assert recomputed == list(network.blocks)
    network.enable_gradient_checkpointing()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), plain, strict=True))
    network.disable_gradient_checkpointing()
    assert not network.is_gradient_checkpointing


def test_repeated_blocks_compile_by_diffusers_switch(pipeline):
    plain = draw(pipeline)
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(draw(pipeline), plain)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_fp8_storage_draws_nearly_the_same(pipeline, compute):
    pipeline.to(dtype=compute)
    plain = draw(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=compute)
    kinds = [parameter.dtype for parameter in pipeline.transformer.parameters()]
    assert kinds.count(FP8) > len(kinds) / 2
    cast = draw(pipeline)
    assert not torch.equal(cast, plain)
    assert (cast - plain).abs().max() < 0.5 * plain.std()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_fp8_storage_has_nearly_the_same_gradients(pipeline, compute):
    pipeline.to(dtype=compute)
    network = pipeline.transformer.train().requires_grad_(True)
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).to(compute)

    def gradients():
        network.zero_grad()
        condition = Condition(torch.full((2,), 0.5), pipeline.encode_prompt(["tea", "a cup"])[0])
        network(latents, condition).sample.float().square().mean().backward()
        # a copy: casting a parameter casts its gradient too
        return torch.cat([parameter.grad.flatten().float() for parameter in network.parameters()])

    plain = gradients()
    network.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=compute)
    kinds = [parameter.dtype for parameter in network.parameters()]
    assert kinds.count(FP8) > len(kinds) / 2
    cast = gradients()
    assert cast.isfinite().all()
    assert not torch.equal(cast, plain)
    assert (cast - plain).norm() < 0.1 * plain.norm()


def test_sequential_offloading_draws_the_same_pixels(pipeline):
    """Every part waits on the meta device between its calls, so nothing may read weights without a call."""
    plain = pipeline("tea", seed=1, output_type="pt").images
    # as `enable_sequential_cpu_offload`, which insists on an accelerator
    pipeline.to("cpu")
    for part in (pipeline.transformer, pipeline.text, pipeline.vae):
        cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
    assert pipeline.text.device == pipeline.vae.device == torch.device("meta")
    for _ in range(2):
        assert torch.equal(pipeline("tea", seed=1, output_type="pt").images, plain)
    # the device is kept free, so no LLM stays there
    assert not pipeline.text._reader.llms


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_draws_the_same_pixels(pipeline, kind):
    plain = pipeline("tea", seed=1, output_type="pt").images
    for part in (pipeline.transformer, pipeline.text, pipeline.vae):
        apply_group_offloading(part, CPU, CPU, offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(pipeline("tea", seed=1, output_type="pt").images, plain)


def test_a_condition_moves_as_a_whole(pipeline):
    """accelerate's hooks move arguments by their `to`."""
    texts = pipeline.encode_prompt("tea")[0]
    moved = Condition(torch.zeros(1), texts, {"size": torch.zeros(1, 2)}).to("meta", non_blocking=True)
    tensors = [moved.timesteps, *moved.extra.values()]
    for text in moved.texts:
        tensors += [text.states, text.mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    half = texts[0].to("cpu", torch.bfloat16)
    assert (half.states.dtype, half.mask.dtype) == (torch.bfloat16, torch.bool)


def test_a_pipeline_of_another_ones_parts(pipeline):
    pipeline.card = {"README.md": b"card"}
    other = LIDiTPipeline.from_pipe(pipeline)
    assert all(other.components[name] is part for name, part in pipeline.components.items())
    assert other.card == pipeline.card
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other), draw(pipeline))


@pytest.mark.parametrize("part", ["pipeline", "transformer", "text"])
def test_no_pickle_is_written(pipeline, tmp_path, part):
    saved = pipeline if part == "pipeline" else getattr(pipeline, part)
    saved.save_pretrained(tmp_path / "saved", safe_serialization=False)
    again = type(saved).from_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    if part == "pipeline":
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), draw(pipeline))


@pytest.mark.parametrize("tiled", [False, True])
def test_the_vae_decodes_in_tiles_on_request(pipeline, tiled):
    if tiled:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    image = pipeline("tea", seed=1, output_type="np").images
    assert image.shape == (1, 16, 24, 3)
    assert np.isfinite(image).all()


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def test_a_scheduler_of_another_class_draws_if_it_reads_the_same_predictions(pipeline):
    config = pipeline.scheduler.config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, **FLOW)
    assert draw(pipeline).isfinite().all()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    assert draw(pipeline).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "scheduler", "message"),
    [
        ("flow", DPMSolverMultistepScheduler, "take prediction_type='flow_prediction', use_flow_sigmas=True"),
        ("flow", EulerDiscreteScheduler, "FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler"),
        ("ddpm", FlowMatchEulerDiscreteScheduler, "objective ddpm: take DPMSolverMultistepScheduler"),
    ],
)
def test_a_scheduler_that_reads_other_predictions_is_refused(objective, scheduler, message):
    pipeline = build_pipeline(sampler_with_families(objective))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UserError, match=message):
        draw(pipeline)


def test_betas_other_than_those_of_training_are_refused(tmp_path):
    built = build_pipeline(sampler_with_families("ddpm"))
    built.save_pretrained(tmp_path / "export")
    other = DPMSolverMultistepScheduler()
    loaded = LIDiTPipeline.from_pretrained(tmp_path / "export", scheduler=other)
    with pytest.raises(UserError, match=r"beta_start=0\.00085"):
        draw(loaded)


def test_a_text_part_reads_batches_apart(pipeline):
    assert isinstance(pipeline.text, LIDiTText)
    together, alone = pipeline.text(["tea", ""], []), pipeline.text(["tea", ""])
    assert together[1] == []
    for ours, theirs in zip(together[0], alone[0], strict=True):
        assert torch.equal(ours.states, theirs.states)
