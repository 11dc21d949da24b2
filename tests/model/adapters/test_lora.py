"""LoRA: nothing at its start, a change of matrices once trained, and the base's names for the base."""

import pytest
import torch

from model.adapter import freeze_base, is_adapter
from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.adapters.lora import LoRALinear
from model.common.errors import UserError
from model.condition import Condition
from tests.helpers.networks import random_inputs, random_network, randomise


def with_lora(targets=None, rank=3, alpha=6.0):
    network = random_network()
    config = LoRAConfig(rank, alpha, targets) if targets else LoRAConfig(rank, alpha)
    return attach_adapters(network, UsersConfig(), config).double()


def predict(network):
    latents, timesteps, texts = random_inputs()
    return network(latents, Condition(timesteps, texts))


def test_a_fresh_addition_changes_nothing_and_keeps_the_names_of_the_base():
    network, plain = with_lora(), random_network()
    assert torch.equal(predict(network), predict(plain))
    base = {name: value for name, value in network.state_dict().items() if not is_adapter(name)}
    assert base.keys() == plain.state_dict().keys()
    assert all(torch.equal(base[name], value) for name, value in plain.state_dict().items())


def test_a_trained_addition_is_a_change_of_the_matrix():
    network, merged = with_lora(), random_network()
    generator = torch.Generator().manual_seed(3)
    for path, layer in network.named_modules():
        if isinstance(layer, LoRALinear):
            for part in (layer.lora_A, layer.lora_B):
                torch.nn.init.normal_(part.weight, std=0.1, generator=generator)
            weight = merged.get_submodule(path).weight
            with torch.no_grad():
                weight += 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.allclose(predict(network), predict(merged), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(predict(network), predict(random_network()))


def test_only_the_additions_of_the_named_layers_are_trained():
    network = with_lora(["query_key_value", "down"])
    freeze_base(network)
    randomise(network)
    predict(network).square().mean().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    expected = set()
    for block in range(2):
        for layer in ("self_attention.query_key_value", "mlp.down"):
            expected |= {f"blocks.{block}.{layer}.lora_{part}.weight" for part in "AB"}
    assert trained == expected


def test_a_name_of_no_layer_is_named():
    with pytest.raises(UserError, match=r"lora\.targets names to_q"):
        with_lora(["to_q"])
