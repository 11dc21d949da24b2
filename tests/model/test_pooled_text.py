"""A family that gives one vector, and the guidance as a condition: the text side of HunyuanVideo."""

from dataclasses import replace

import pytest
import torch

from model.common.errors import UserError
from model.condition import Condition
from model.conditions import CONDITIONS
from model.config import FusionConfig
from model.dit import LIDiT
from model.flops import count_parameters
from pipeline.stage.config import load_stage
from tests.helpers.networks import SMALL, WIDTHS, close, random_inputs, random_network, randomise

FUSION = FusionConfig(mode="none", pooled=1)


def test_a_pooled_family_starts_as_nothing_and_is_counted():
    plain = LIDiT(SMALL, replace(FUSION, pooled=0), WIDTHS[:1])
    randomise(plain)
    network = LIDiT(SMALL, FUSION, WIDTHS[:2]).double().eval()
    missing = network.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(name.startswith("fusion.vectors.0.") for name in missing)
    latents, timesteps, texts = random_inputs()
    one = plain(latents, Condition(timesteps, texts[:1]))
    assert torch.equal(network(latents, Condition(timesteps, texts)), one)
    counts = count_parameters(SMALL, FUSION, WIDTHS[:2])
    assert counts["total"] == sum(parameter.numel() for parameter in network.parameters())


def test_its_last_token_alone_is_read():
    network = random_network(FUSION)
    latents, timesteps, texts = random_inputs(lengths=(4, 2))
    before = network(latents, Condition(timesteps, texts))
    for place, matters in ((0, False), (-1, True)):
        states = texts[1].states.clone()
        for row in range(2):
            tokens = int(texts[1].mask[row].sum())
            states[row, place % tokens] += 1
        changed = network(latents, Condition(timesteps, [texts[0], replace(texts[1], states=states)]))
        assert close(changed, before) is not matters


def test_the_preset_has_the_published_refiner():
    stage = load_stage("hunyuan_text")
    assert (stage.fusion.crop, stage.fusion.refiner_blocks, stage.objective.shift) == ("before", 2, 7.0)
    with torch.device("meta"):
        network = LIDiT(stage.dit(16, axes=3), stage.fusion, [4096, 768])
    refiner = sum(parameter.numel() for parameter in network.fusion.refiners.parameters())
    # two blocks of 14 D^2 at D = 3,072: attention 4, feed-forward 8, gates 2
    assert refiner == pytest.approx(2 * 14 * 3072**2, rel=1e-3)
    assert 0.26e9 < refiner < 0.27e9
    counts = count_parameters(stage.dit(16, axes=3), stage.fusion, [4096, 768])
    assert counts["total"] == sum(parameter.numel() for parameter in network.parameters())


def test_one_family_has_to_be_attended_to():
    with pytest.raises(UserError, match="leaves none of the 1 families"):
        FusionConfig(families=["clip"], mode="none", pooled=1)


def test_guidance_is_a_condition():
    condition = CONDITIONS["guidance"]
    assert condition.for_sampling(1, 1, None).item() == 1
    assert condition.for_sampling(1, 1, "6").item() == 6
    with pytest.raises(UserError, match="give a number from 0"):
        condition.for_sampling(1, 1, "much")
    network = random_network(conditions=["guidance"])
    latents, timesteps, texts = random_inputs()
    values = [
        network(latents, Condition(timesteps, texts, {"guidance": torch.full((2,), scale)}))
        for scale in (1.0, 6.0)
    ]
    assert not close(*values)
