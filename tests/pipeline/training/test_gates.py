"""The gates' magnitudes are those of the gates."""

import pytest
import torch

from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from pipeline.training.gates import GateStats

FAMILIES = ["a", "b"]


def network(**fusion):
    torch.manual_seed(0)
    return LIDiT(
        DiTConfig(depth=1, width=32, heads=4, channels=4), FusionConfig(families=FAMILIES, **fusion), [8, 12]
    )


def run(model):
    texts = [Text(torch.randn(3, 5, width), torch.ones(3, 5, dtype=torch.bool), 2) for width in (8, 12)]
    model(torch.randn(3, 4, 8, 8), Condition(torch.rand(3), texts))


def test_constant_gates_are_read_as_their_mean_magnitude():
    model = network(refiner_blocks=2, collaborative_blocks=1)
    meter = GateStats(model, FAMILIES)
    expected = {}
    with torch.no_grad():
        for index, name in enumerate(FAMILIES):
            for number, block in enumerate(model.fusion.refiners[index].blocks):
                block.gates.linear.bias.uniform_(-1, 1)
                expected[f"gate_refiner_{name}_{number}"] = block.gates.linear.bias.abs().mean()
            bias = model.fusion.collaborative.blocks[0].branches[index].modulation.linear.bias.uniform_(-1, 1)
            _, _, gate, _, _, gate_mlp = bias.chunk(
                6
            )  # shift, scale, gate of attention and of the feed-forward layer
            expected[f"gate_collaborative_{name}_0"] = torch.cat([gate, gate_mlp]).abs().mean()
    run(model)
    assert meter.take() == []  # off
    meter.on = True
    run(model)
    assert {name: float(value) for name, value in meter.take()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert sorted(meter.names) == sorted(expected)
    assert meter.take() == []


@pytest.mark.parametrize("fusion", [{"refiner": "none", "mode": "concat"}, {"gate": False, "mode": "concat"}])
def test_where_there_are_no_gates_nothing_is_measured(fusion):
    meter = GateStats(network(**fusion), FAMILIES)
    meter.on = True
    assert (meter.names, meter.take()) == ([], [])
