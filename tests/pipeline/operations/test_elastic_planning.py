"""The estimate of an elastic network: parameters of the built one, shares of its steps."""

import io
from collections import Counter

import pytest
import torch
from rich.console import Console

from pipeline.diffusion.objective import make_objective
from pipeline.engine.network import make_network
from pipeline.estimate import show
from pipeline.operations.planning import Setup, make_plan
from pipeline.stage.config import load_stage
from pipeline.training.elastic import PartChoice

SETUP = Setup(8)
OVERRIDES = ["elastic.depths=[28,20,14]", "elastic.patches=[2,4]", "data.store=x"]


@pytest.mark.parametrize("more", [[], ["elastic.segments=[0.6]"], ["elastic.sandwich=true"]])
def test_shares_are_those_of_the_steps(more):
    stage = load_stage("li_dit_1b_256", [*OVERRIDES, *more])
    dit = stage.dit(16)
    choice = PartChoice(stage.elastic, dit, make_objective(stage.objective), 0)
    counts = Counter(part for index in range(4000) for part in choice.parts(0, index, 1024))
    shares = choice.shares(1024)
    assert sum(shares.values()) == pytest.approx(2 if stage.elastic.sandwich else 1)
    assert all(counts[part] / 4000 == pytest.approx(share, abs=0.03) for part, share in shares.items())
    assert set(counts) == set(shares)


def test_parts_have_the_parameters_and_flops_of_plain_networks():
    stage, plain = load_stage("li_dit_1b_256", OVERRIDES), load_stage("li_dit_1b_256", ["data.store=x"])
    plan = make_plan(stage, SETUP)
    whole = make_plan(plain, SETUP)
    assert plan.parts[0].parameters == whole.parameters["total"]
    assert plan.parts[0].flops_per_sample == whole.flops_per_sample
    half = load_stage("li_dit_1b_256", ["data.store=x", "model.depth=14", "model.patch=4"])
    assert plan.parts[-1].flops_per_sample == make_plan(half, SETUP).flops_per_sample
    expected = sum(part.share * part.flops_per_sample for part in plan.parts)
    assert plan.flops_per_sample == pytest.approx(expected)
    with torch.device("meta"):
        network = make_network(stage, stage.dit(16), SETUP.llm_widths)
    assert plan.parameters["total"] == sum(parameter.numel() for parameter in network.parameters())


def test_the_table_has_a_row_per_part():
    console = Console(width=200, record=True, file=io.StringIO())
    show(load_stage("li_dit_1b_256", OVERRIDES), [SETUP], console)
    text = console.export_text()
    assert all(f"depth{depth}_patch{patch}" in text for depth in (28, 20, 14) for patch in (2, 4))
