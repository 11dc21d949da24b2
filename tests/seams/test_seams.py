"""What a researcher adds works everywhere at once: trained on two ranks, resumed, estimated, sampled,
exported."""

from dataclasses import replace

import pytest
import torch

from model.blocks import BLOCKS
from model.common.errors import UserError
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.flops import count_parameters, flops_per_sample
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.diffusion.objective import OBJECTIVES, make_objective
from pipeline.estimate import Setup, make_plan
from pipeline.export import build_pipeline
from pipeline.inference.attention_maps import attention_to_tokens
from pipeline.inference.sampler import SamplingParams, extra_conditions
from pipeline.stage.config import load_stage
from pipeline.stage.objective import ObjectiveConfig
from pipeline.training.callbacks import Callback
from tests.helpers import fake_snapshot, tiny_sampler
from tests.helpers.distributed import on_ranks
from tests.helpers.networks import SMALL, WIDTHS, normal, random_inputs, random_network
from tests.seams import seam_tasks, toys

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(fake_snapshot.make_local(tmp_path_factory.mktemp("store"), fake_snapshot.TWO_BUCKETS))


TOYS = {
    "block": {"model__block": "toy_text_only"},
    "compiled block": {"model__block": "toy_text_only", "model__compile": True},
    "objective": {"objective__name": "toy_clean", "objective__settings": {"power": 2.0}},
    "a time for each patch": {"objective__name": "toy_patch_times"},
    "condition": {"model__conditions": ["toy_size"]},
}


@pytest.fixture(scope="module")
def default_losses(store, tmp_path_factory):
    """Losses without a toy."""
    results = on_ranks(2, seam_tasks.train, store, str(tmp_path_factory.mktemp("default")), None, {})
    return [report["loss"] for report in results[0][1]]


@pytest.mark.parametrize(
    "settings",
    [
        # Compiling takes most of a minute on each rank.
        pytest.param(each, id=toy, marks=[pytest.mark.slow] if "model__compile" in each else [])
        for toy, each in TOYS.items()
    ],
)
def test_a_toy_trains_on_two_ranks_and_a_stopped_run_repeats_it(store, tmp_path, default_losses, settings):
    straight = on_ranks(2, seam_tasks.train, store, str(tmp_path / "straight"), None, settings)
    stopped = on_ranks(2, seam_tasks.train, store, str(tmp_path / "stopped"), 3, settings)
    resumed = on_ranks(2, seam_tasks.train, store, str(tmp_path / "stopped"), None, settings)
    assert [code for code, _ in straight + resumed] == [0] * 4
    assert [code for code, _ in stopped] == [85] * 2
    losses = [report["loss"] for report in straight[0][1]]
    assert losses == [report["loss"] for report in resumed[0][1]]
    assert len(losses) == seam_tasks.STEPS
    assert losses != default_losses
    one, other = (load_weights(tmp_path / name / "small", "raw") for name in ("straight", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.any() for _, tensor in one.items())  # also what starts at zero has been trained


def test_a_toy_block_is_counted_estimated_and_shown():
    sizes = replace(SMALL, block="toy_text_only")
    network = LIDiT(sizes, FusionConfig(), WIDTHS[:2])
    counts = count_parameters(sizes, FusionConfig(), WIDTHS[:2])
    assert counts["total"] == sum(parameter.numel() for parameter in network.parameters())
    assert flops_per_sample(sizes, FusionConfig(), WIDTHS[:2], (4, 6), [5, 5]) < flops_per_sample(
        SMALL, FusionConfig(), WIDTHS[:2], (4, 6), [5, 5]
    )
    # what a compiled block keeps was measured for the network's own block only
    stage = load_stage("li_dit_1b_256", ["model.block=toy_text_only", "model.compile=false"])
    plain = load_stage("li_dit_1b_256", ["model.compile=false"])
    toy, paper = make_plan(stage, Setup(64)), make_plan(plain, Setup(64))
    assert toy.parameters["dit"] < paper.parameters["dit"]
    assert toy.memory["activations"] < paper.memory["activations"]

    latents, timesteps, texts = random_inputs(lengths=(4, 4))
    network = random_network(block="toy_text_only")
    one = Condition(timesteps[:1], [text.row(0) for text in texts])
    shares = attention_to_tokens(network, latents[:1], one)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.block=toy_text_onli", "did you mean `toy_text_only`"),
        ("model.conditions=[toy_siez]", "did you mean `toy_size`"),
        ("objective.name=toy_claen", "did you mean `toy_clean`"),
    ],
)
def test_a_mistyped_name_is_one_line(store, setting, says):
    stage = load_stage("demo", [setting])

    def build():
        make_objective(stage.objective)
        return LIDiT(stage.dit(16), stage.fusion, [8, 8])

    with pytest.raises(UserError, match=says):
        build()


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="registered already"):
        BLOCKS.register("dit")(toys.TextOnlyBlock)
    assert list(OBJECTIVES)[:2] == ["ddpm", "flow"]


# -- per-place timesteps -------------------------------------------------------------------------------------


def test_equal_times_of_all_patches_are_one_time_of_the_sample():
    network = random_network()
    latents, timesteps, texts = random_inputs()
    patches = 4 * 6 // 4
    one = network(latents, Condition(timesteps, texts))
    each = network(latents, Condition(timesteps[:, None].repeat(1, patches), texts))
    torch.testing.assert_close(each, one)


def test_a_patch_reads_its_own_time():
    network = random_network()
    latents, timesteps, texts = random_inputs()
    times = timesteps[:, None].repeat(1, 6)
    times[:, :3], times[:, 3:] = 0.2, 0.8
    other = times.clone()
    other[:, [0, 5]] = other[:, [5, 0]]  # the same mean, so the text side reads the same time
    assert not torch.allclose(
        network(latents, Condition(times, texts)), network(latents, Condition(other, texts))
    )


def test_noise_is_added_patch_by_patch():
    objective = make_objective(ObjectiveConfig(), patch=(2, 2))
    clean, noise = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    noisy, target = objective.add_noise(clean, noise, torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
    expected = torch.tensor([[0.0, 0.25], [0.5, 1.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(noisy[0], expected.expand(3, 4, 4))
    assert torch.equal(target, noise - clean)


# -- latents with a time axis --------------------------------------------------------------------------------


def test_the_same_network_code_takes_latents_with_a_time_axis():
    sizes = replace(SMALL, axes=3, patch_frames=2)
    network = LIDiT(sizes, FusionConfig(), WIDTHS[:2])
    assert count_parameters(sizes, FusionConfig(), WIDTHS[:2])["total"] == sum(
        p.numel() for p in network.parameters()
    )
    network = random_network(axes=3, patch_frames=2)
    _, timesteps, texts = random_inputs()
    clip = normal(2, 4, 4, 4, 6)
    assert network(clip, Condition(timesteps, texts)).shape == clip.shape
    with pytest.raises(UserError, match="latents of 3 x 4 x 6 do not divide into patches of 2 x 2 x 2"):
        network(clip[:, :, :3], Condition(timesteps, texts))


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_objectives_take_latents_with_a_time_axis(name):
    objective = make_objective(ObjectiveConfig(name=name))
    clip, noise = torch.randn(2, 2, 4, 3, 8, 8)
    times = objective.sample_timesteps(torch.tensor([0.2, 0.7]))
    noisy, target = objective.add_noise(clip, noise, times)
    frame, frame_target = objective.add_noise(clip[:, :, 0], noise[:, :, 0], times)
    assert torch.equal(noisy[:, :, 0], frame)
    assert torch.equal(target[:, :, 0], frame_target)


def test_a_clip_costs_its_frames():
    stage = load_stage("li_dit_1b_256")
    image, clip = make_plan(stage, Setup(64)), make_plan(stage, Setup(64, frames=8))
    assert clip.bytes_per_pair > image.bytes_per_pair
    assert clip.flops_per_sample > 8 * image.flops_per_sample
    # not 8 times, since the text's share stays, but each frame costs the same
    one, eight = image.memory["activations"], clip.memory["activations"]
    two = make_plan(stage, Setup(64, frames=2)).memory["activations"]
    assert eight - one == pytest.approx(7 * (two - one))
    assert eight > 5 * one


def test_a_stage_on_clips_trains(tmp_path):
    store = seam_tasks.make_clips(tmp_path)
    ((code, reports),) = on_ranks(1, seam_tasks.train, store, str(tmp_path), None, {"model__patch_frames": 1})
    assert code == 0
    assert len(reports) == seam_tasks.STEPS
    assert reports[-1]["grad_norm"] > 0


# -- conditions ----------------------------------------------------------------------------------------------


def toy_sampler(objective: str = "flow", **sizes):
    """A sampler whose network has other sizes, with random weights also where it starts at zero."""
    sampler = tiny_sampler.sampler_with_families(objective)
    torch.manual_seed(0)
    network = LIDiT(
        replace(sampler.network.sizes, **sizes),
        sampler.network.fusion.config,
        list(tiny_sampler.WIDTHS.values()),
    )
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    sampler.network = network.eval().requires_grad_(False)
    return sampler


PARAMS = SamplingParams(3, 3.0, 16, 24)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        pytest.param({"block": "toy_text_only"}, {}, id="block"),
        pytest.param({"objective": "toy_clean"}, {}, id="objective"),
        pytest.param({"conditions": ["toy_size"]}, {"toy_size": "512x128"}, id="condition"),
    ],
)
def test_a_toy_is_sampled_and_exported_alike(tmp_path, monkeypatch, settings, asked):
    from pipeline import diffusers_pipeline

    monkeypatch.setattr(
        diffusers_pipeline,
        "load_llm",
        lambda family, device: tiny_sampler.LetterLLM(tiny_sampler.WIDTHS[family.name]),
    )
    sampler = toy_sampler(**settings)
    sampled = sampler.latents(["a red cat"], [5], replace(PARAMS, conditions=asked))
    plain = toy_sampler() if not asked else sampler
    assert not torch.equal(plain.latents(["a red cat"], [5], PARAMS), sampled)

    build_pipeline(sampler).save_pretrained(tmp_path / "export")
    pipeline = diffusers_pipeline.LIDiTPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"seed": 5, "height": 16, "width": 24, "output_type": "latent"}
    arguments |= {"num_inference_steps": 3, "guidance_scale": 3.0}
    assert torch.equal(pipeline(["a red cat"], conditions=asked, **arguments).images, sampled)


def test_an_unknown_condition_or_value_is_one_line():
    with pytest.raises(UserError, match="it has none"):
        extra_conditions(
            tiny_sampler.make_sampler().network, replace(PARAMS, conditions={"size": "1"}), 1, CPU
        )
    with pytest.raises(UserError, match="write HEIGHTxWIDTH"):
        toy_sampler(conditions=["toy_size"]).check(replace(PARAMS, conditions={"toy_size": "large"}))


# -- every size of the network from a stage ------------------------------------------------------------------


def test_every_field_of_the_network_can_be_set_from_a_stage():
    stage = load_stage("demo", ["model.mlp_ratio=3.0", "model.frequency_width=64", "model.patch_frames=2"])
    dit = stage.dit(4)
    assert (dit.mlp_ratio, dit.frequency_width, dit.patch_frames, dit.channels) == (3.0, 64, 2, 4)
    assert load_stage("demo", ["model.preset=li_dit_1b"]).dit(16).depth == 4  # the demo sets its own depth
    assert load_stage("li_dit_1b_256", ["model.preset=tiny"]).dit(16) == DiTConfig(
        depth=6, width=256, heads=4
    )


def test_callbacks_see_every_step(store, tmp_path):
    ((steps, names),) = on_ranks(1, seam_tasks.watched, store, str(tmp_path))
    assert steps == list(range(seam_tasks.STEPS))
    assert "toy_quantity" in names


def test_a_callback_does_nothing_by_default():
    assert list(Callback().quantities()) == []


def test_conditions_are_cut_and_joined_by_sample():
    latents, timesteps, texts = random_inputs(lengths=(4, 2))
    condition = Condition(timesteps, texts, {"size": torch.arange(4.0).view(2, 2)})
    joined = Condition.concatenate([condition.row(0), condition.row(1)])
    assert torch.equal(joined.timesteps, timesteps)
    assert torch.equal(joined.extra["size"], condition.extra["size"])
    assert [text.mask.sum().item() for text in joined.texts] == [text.mask.sum().item() for text in texts]
    assert isinstance(joined.texts[0], Text)
    assert condition.at(0.5).timesteps.unique().tolist() == [0.5]
    assert len(latents) == 2
