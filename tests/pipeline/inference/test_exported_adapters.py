"""Adapters of an export: the folder is the base's, a user's file gives the same bits, LoRA is peft's."""

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter import is_adapter
from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.common.errors import UserError
from pipeline import diffusers_pipeline
from pipeline.diffusers_pipeline import LIDiTPipeline
from pipeline.export import build_pipeline
from pipeline.inference.adapter_files import load_user_adapter, save_adapters
from pipeline.inference.sampler import SamplingParams
from pipeline.inference.source import load_export
from tests.helpers.tiny_sampler import CPU, WIDTHS, LetterLLM, make_sampler, sampler_with_families

USERS = UsersConfig(count=3, tokens=2, width=8, heads=2, blocks=1, rank=4)
LORA = LoRAConfig(rank=2, alpha=6.0)
CALL = {"prompt": ["a red cat"], "seed": 4, "output_type": "latent"}
PARAMS = SamplingParams(3, 3.0, 16, 24)


def adapted(users=True, lora=True):
    sampler = sampler_with_families()
    network = sampler.network.requires_grad_(False)
    attach_adapters(network, USERS if users else UsersConfig(), LORA if lora else LoRAConfig())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_adapter(name):
                # By the name, so that one adapter is the same beside another and without.
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.normal_(0, 0.3, generator=generator)
        if users:
            network.adapters["users"].table.weight[1] = 0.0
    return sampler


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(diffusers_pipeline, "load_llm", lambda family, device: LetterLLM(WIDTHS[family.name]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("exports") / "export"
    sampler = adapted()
    build_pipeline(sampler).save_pretrained(made)
    save_adapters(made, sampler.network)
    return made


def quiet(folder):
    pipeline = LIDiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_the_base_and_a_file_each_for_adapter_users_and_lora(folder, tmp_path):
    build_pipeline(sampler_with_families()).save_pretrained(tmp_path / "base")
    with_adapters, base = files(folder), files(tmp_path / "base")
    assert {name: with_adapters[name] for name in base} == base
    added = {"adapter.safetensors", "00000.safetensors", "00002.safetensors"}  # the row of user 1 is deleted
    added = {f"users/{name}" for name in added}
    added |= {"lora/pytorch_lora_weights.safetensors"}
    added |= {"lora/adapter_model.safetensors", "lora/adapter_config.json"}
    assert set(with_adapters) - set(base) == added


@pytest.fixture(scope="module")
def folder_without_lora(folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("exports") / "export"
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns("lora"))
    return made


def test_a_loaded_user_has_the_samplers_bits_and_saving_leaves_the_adapter_out(
    folder, folder_without_lora, tmp_path
):
    reference, pipeline = adapted(lora=False), quiet(folder)
    base = pipeline(**CALL).images
    assert torch.equal(base, make_sampler().latents(CALL["prompt"], [4], PARAMS))
    for user, scale in (("2", None), ("2", 1.5), ("0", None)):
        params = SamplingParams(3, 3.0, 16, 24, user=user, user_guidance=scale)
        expected = reference.latents(CALL["prompt"], [4], params)
        pipeline.load_user(folder / "users" / f"0000{user}.safetensors")
        assert torch.equal(pipeline(**CALL, user_guidance=scale).images, expected)
        # Without LoRA, which an export's sampler attaches by itself.
        exported = load_export(folder_without_lora, CPU, torch.float32)
        assert torch.equal(exported.latents(CALL["prompt"], [4], params), expected)

    pipeline.save_pretrained(tmp_path / "again")
    assert not [name for name in files(tmp_path / "again") if "users" in name]
    assert torch.equal(quiet(tmp_path / "again")(**CALL).images, base)
    assert not torch.equal(pipeline(**CALL).images, base)  # saving has left the adapter where it was
    pipeline.unload_user()
    assert torch.equal(pipeline(**CALL).images, base)


def test_wrong_files_are_named(folder, tmp_path):
    pipeline = quiet(folder)
    with pytest.raises(UserError, match=r"adapter\.safetensors is not a user's file"):
        pipeline.load_user(folder / "users" / "adapter.safetensors")
    alone = tmp_path / "00002.safetensors"
    alone.write_bytes((folder / "users" / "00002.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"adapter\.safetensors: not there"):
        pipeline.load_user(alone)
    pipeline.load_user(alone, folder / "users" / "adapter.safetensors")
    with pytest.raises(UserError, match="is not an adapter of users"):
        load_user_adapter(alone, pipeline.transformer.sizes)


def test_lora_has_the_keys_of_peft_with_its_scale_inside(folder):
    weights = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    network = adapted(users=False).network
    layer = network.blocks[1].mlp.down
    assert torch.equal(weights["transformer.blocks.1.mlp.down.lora_A.weight"], layer.lora_A.weight)
    assert torch.equal(weights["transformer.blocks.1.mlp.down.lora_B.weight"], 3.0 * layer.lora_B.weight)
    assert len(weights) == 2 * 2 * 7
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    matched = [
        name
        for name, _ in sampler_with_families().network.named_modules()
        if re.fullmatch(config["target_modules"], name)
    ]
    # None of the refiners, whose layers have the same last names.
    assert {f"transformer.{name}.lora_A.weight" for name in matched} == {
        name for name in weights if "lora_A" in name
    }


@pytest.mark.parametrize("user", ["", "2"])
def test_sampling_from_an_export_has_its_lora(folder, user):
    params = replace(PARAMS, user=user)
    ours = load_export(folder, CPU, torch.float32).latents(CALL["prompt"], [4], params)
    assert torch.allclose(ours, adapted().latents(CALL["prompt"], [4], params), atol=1e-5)
    assert not torch.allclose(ours, adapted(lora=False).latents(CALL["prompt"], [4], params), atol=1e-3)


def test_damaged_lora_and_that_of_another_network_are_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "export")
    path = copy / "lora" / "pytorch_lora_weights.safetensors"
    weights = load_file(path)
    save_file({name.replace("blocks.1", "blocks.9"): value for name, value in weights.items()}, path)
    with pytest.raises(UserError, match=r"LoRA of blocks\.9.*no such linear layer"):
        load_export(copy, CPU, torch.float32)
    save_file({name: value[:, :-1].contiguous() for name, value in weights.items()}, path)
    with pytest.raises(UserError, match="LoRA of another network"):
        load_export(copy, CPU, torch.float32)
    path.write_bytes(b"12345678" * 4)
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        load_export(copy, CPU, torch.float32)


needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs the extra lora")


@needs_peft
@pytest.mark.parametrize("form", ["folder", "file", "weight_name", "tensors"])
def test_diffusers_loads_lora_by_peft_and_unloads_it(folder, form):
    pipeline = quiet(folder)
    base = pipeline(**CALL).images
    file = folder / "lora" / "pytorch_lora_weights.safetensors"
    if form == "weight_name":
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    else:
        forms = {"folder": file.parent, "file": file, "tensors": load_file(file)}
        pipeline.load_lora_weights(forms[form], adapter_name="flowers")
        assert list(pipeline.transformer.peft_config) == ["flowers"]
    if form != "tensors":
        # The file says which layers they are; by last names, those of the refiners would be among them.
        names = [name for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name]
        assert len(names) == 2 * 7
    expected = adapted(users=False).latents(CALL["prompt"], [4], PARAMS)
    assert torch.allclose(pipeline(**CALL).images, expected, atol=1e-4)
    pipeline.unload_lora_weights()
    assert torch.equal(pipeline(**CALL).images, base)


@needs_peft
def test_users_and_lora_of_one_run_are_loaded_one_after_the_other(folder):
    params = replace(PARAMS, user="2")
    expected = adapted().latents(CALL["prompt"], [4], params)
    pipeline = quiet(folder)
    pipeline.load_lora_weights(folder / "lora")
    pipeline.load_user(folder / "users" / "00002.safetensors")
    assert torch.allclose(pipeline(**CALL).images, expected, atol=1e-4)


@needs_peft
def test_files_without_lora_of_the_network_are_named(folder, tmp_path):
    pipeline = quiet(folder)
    with pytest.raises(UserError, match=r"none\.safetensors: not there"):
        pipeline.load_lora_weights(folder / "lora", weight_name="none.safetensors")
    with pytest.raises(UserError, match=r"no key begins with `transformer\.`"):
        pipeline.load_lora_weights(folder / "lora" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the tensors: no key"):
        pipeline.load_lora_weights({"unet.lora_A.weight": torch.zeros(2, 2)})


@needs_peft
def test_peft_loads_the_same_folder(folder):
    from peft import PeftModel

    pipeline = quiet(folder)
    wrapped = PeftModel.from_pretrained(pipeline.transformer, str(folder / "lora"))
    added = {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert len(added) == 2 * 2 * 7
    expected = adapted(users=False).latents(CALL["prompt"], [4], PARAMS)
    assert torch.allclose(pipeline(**CALL).images, expected, atol=1e-4)
