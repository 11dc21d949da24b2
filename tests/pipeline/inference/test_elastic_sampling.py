"""Parts of an elastic network in sampling: images of a part are those of the plain network that it is."""

import json
from dataclasses import replace

import pytest
import torch

from model.common.errors import UserError
from model.elastic.weights import plain_network
from model.sub_network import SubNetwork
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.diffusion.guidance import Guided
from pipeline.export import build_pipeline
from pipeline.inference.elastic import ChosenParts, choose_parts, part_choices
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import choose_sampling_params, load_export
from pipeline.inference.studio import GenerationRequest, InteractiveSampler, Limits
from pipeline.sample import parse
from tests.helpers.tiny_sampler import CPU, elastic_sampler

PARAMS = SamplingParams(3, 3.0, 16, 32)
PROMPTS, SEEDS = ["a cat", "two red dogs"], [1, 2]


def at(sampler, **parts):
    return sampler.latents(PROMPTS, SEEDS, replace(PARAMS, parts=ChosenParts(**parts)))


@pytest.mark.parametrize(
    ("dtype", "position"),
    [(torch.float32, "convolution"), (torch.bfloat16, "convolution"), (torch.float32, "rope")],
)
@pytest.mark.parametrize(("depth", "patch"), [(3, 1), (2, 1), (2, 2)])
def test_an_exported_part_samples_the_same_images_bit_for_bit(tmp_path, depth, patch, dtype, position):
    sampler = elastic_sampler(dtype, position)
    expected = at(sampler, depth=depth, patch=patch)
    sampler.network = plain_network(sampler.network, depth, patch)
    build_pipeline(sampler).save_pretrained(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.rglob("*.json")}
    assert not any("elastic" in text for text in files.values())
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())["dit_config"]
    assert config["depth"] == depth
    # only where it is needed: other folders are as they always were
    assert config.get("position_scale") == (2 if position == "rope" and patch == 2 else None)
    pipeline = LIDiTPipeline.from_pretrained(
        tmp_path, torch_dtype={"transformer": dtype, "default": torch.float32}
    )
    pipeline.text._reader = sampler.reader
    latents = pipeline(
        PROMPTS[0],
        seed=SEEDS[0],
        height=16,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert torch.equal(latents[0], expected[0])

    loaded = load_export(tmp_path, CPU, dtype)
    loaded.reader = sampler.reader
    assert torch.equal(loaded.latents(PROMPTS, SEEDS, PARAMS), expected)


def test_the_default_is_the_full_network_and_parts_differ():
    sampler = elastic_sampler()
    latents = [at(sampler), at(sampler, depth=3), at(sampler, depth=2), at(sampler, patch=2)]
    assert torch.equal(latents[0], latents[1])
    assert not any(torch.allclose(latents[0], other) for other in latents[2:])
    assert torch.equal(at(sampler, depth=2, null_depth=2), latents[2])
    assert not torch.allclose(at(sampler, null_depth=2), latents[0])


def test_the_null_branch_runs_on_its_own_part():
    sampler = elastic_sampler()
    seen = []

    def predict(latents, condition):
        seen.append(condition.part)
        return sampler.network(latents, condition)

    condition = sampler.condition(PROMPTS, PARAMS)
    null = sampler.condition(["", ""], PARAMS)
    whole, part = SubNetwork(3, 1), SubNetwork(2, 2)
    latents = torch.randn(2, *sampler.latent_shape(PARAMS))
    guided = Guided(predict, replace(condition, part=whole), replace(null, part=part), 3.0)(latents, 0.7)
    assert seen == [whole, part] * 2  # image by image on the CPU
    alone = [
        Guided(sampler.network, replace(given, part=own), null, 1.0)(latents, 0.7)
        for given, own in ((condition, whole), (null, part))
    ]
    assert torch.allclose(guided, alone[1] + 3.0 * (alone[0] - alone[1]), atol=1e-5)


def test_segments_choose_the_patches_of_each_step():
    sampler = elastic_sampler(segments=[0.6])
    seen = []
    forward = sampler.network.forward
    sampler.network.forward = lambda latents, condition: (
        seen.append((condition.timesteps[0].item(), condition.part)),
        forward(latents, condition),
    )[1]
    at(sampler, depth=2)
    assert {part.depth for _, part in seen} == {2}
    assert {part.patch for _, part in seen} == {1, 2}
    assert all(part.patch == (2 if time >= 0.6 else 1) for time, part in seen)
    seen.clear()
    at(sampler, null_depth=2)
    assert {part.depth for _, part in seen} == {2, 3}
    assert all(part.patch == (2 if time >= 0.6 else 1) for time, part in seen)
    assert list(part_choices(sampler.network)) == ["depth3", "depth2"]


@pytest.mark.parametrize(
    ("parts", "size", "message"),
    [
        ({"depth": 1}, (16, 24), "depth 1: the network was trained for depth 3, 2"),
        ({"null_patch": 3}, (16, 24), "patch 3: the network was trained for patch 1, 2"),
        ({"patch": 2}, (16, 8), "multiple of 16"),
        ({"null_patch": 2}, (16, 8), "multiple of 16"),
    ],
)
def test_what_a_network_cannot_do_is_refused_before_the_prompts_are_read(parts, size, message):
    sampler = elastic_sampler()
    params = replace(PARAMS, height=size[0], width=size[1], parts=ChosenParts(**parts))
    with pytest.raises(UserError, match=message):
        sampler.check(params)
    with pytest.raises(UserError, match="null_depth: this network is not elastic"):
        choose_parts(plain_network(sampler.network), ChosenParts(null_depth=2))
    with pytest.raises(UserError, match="in its part of the times"):
        choose_parts(elastic_sampler(segments=[0.6]).network, ChosenParts(patch=2))


def test_the_command_line_names_parts_and_records_say_them():
    arguments = parse(["run", "--prompt", "x", "--depth", "2", "--null-patch", "2"])
    params = choose_sampling_params(elastic_sampler().defaults, arguments)
    assert params.parts == ChosenParts(depth=2, null_patch=2)
    record = params.record()
    assert (record["depth"], record["null_patch"]) == (2, 2)
    assert not {"patch", "parts", "null_depth"} & set(record)
    assert not {"depth", "patch", "parts"} & set(PARAMS.record())


def test_attention_maps_have_the_parts_patches():
    sampler = elastic_sampler()
    for patch in (1, 2):
        params = replace(PARAMS, parts=ChosenParts(depth=2, patch=patch))
        _, maps = sampler.latents_and_words(PROMPTS, SEEDS, params, step=2)
        assert maps[0].shares.shape == (2 // patch, 4 // patch)


def test_the_page_offers_the_parts(tmp_path):
    sampler = elastic_sampler()
    studio = InteractiveSampler({"run": sampler}, tmp_path, Limits())
    assert studio.parts == ["depth3_patch1", "depth2_patch1", "depth3_patch2", "depth2_patch2"]
    request = GenerationRequest("a cat", "", 16, 32, 2, 3.0, 1, 1, "", part="depth2_patch2")
    (column,) = studio.generate(request)
    assert len(column.files) == 1
    for part in ("depth9", "x" * 500):
        with pytest.raises(UserError, match="choose one of them"):
            studio.generate(replace(request, part=part))
