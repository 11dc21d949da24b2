from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model.condition import Condition
from model.config import FusionConfig
from model.dit import LIDiT
from model.flops import count_parameters, flops_per_sample
from model.presets import PRESETS
from tests.helpers.networks import SMALL, WIDTHS, few, random_inputs, random_network

fusions = st.builds(
    FusionConfig,
    mode=st.sampled_from(["none", "concat", "collaborative"]),
    refiner=st.sampled_from(["none", "full", "causal"]),
    refiner_blocks=st.integers(1, 3),
    collaborative_blocks=st.integers(1, 2),
    gate=st.booleans(),
    time=st.booleans(),
    width=st.sampled_from([None, 16]),
    heads=st.sampled_from([None, 4]),
    crop=st.sampled_from(["after", "before"]),
    pool=st.sampled_from(["caption", "all"]),
)


@settings(few, max_examples=60)
@given(fusions, st.integers(1, 3))
def test_parameters_by_formula_are_those_of_the_network(fusion, llms):
    llms = 1 if fusion.mode == "none" else llms
    with torch.device("meta"):
        network = LIDiT(SMALL, fusion, WIDTHS[:llms])
    refiners = sum(parameter.numel() for parameter in network.fusion.parameters())
    total = sum(parameter.numel() for parameter in network.parameters())
    counts = count_parameters(SMALL, fusion, WIDTHS[:llms])
    assert counts == {"dit": total - refiners, "refiners": refiners, "total": total}


@settings(few, max_examples=25)
@given(fusions, st.integers(1, 3), st.sampled_from([1, 2]))
def test_operations_by_formula_are_those_of_the_forward_pass(fusion, llms, patch):
    llms = 1 if fusion.mode == "none" else llms
    network = random_network(fusion, llms, patch=patch).float()
    latents, timesteps, texts = random_inputs(llms, lengths=(5, 5))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(latents, Condition(timesteps, texts))
    tokens, prefixes = [text.states.shape[1] for text in texts], [text.prefix for text in texts]
    formula = flops_per_sample(replace(SMALL, patch=patch), fusion, WIDTHS[:llms], (4, 6), tokens, prefixes)
    assert formula == 3 * counter.get_total_flops() / len(latents)


@pytest.mark.parametrize("preset", ["li_dit_1b_18x64", "li_dit_1b_9x128"])
def test_other_heads_are_the_same_network_but_for_the_gains_of_their_norms(preset):
    def cost(name):
        sizes = [PRESETS[name], FusionConfig(), [4096, 4096]]
        return count_parameters(*sizes)["dit"], flops_per_sample(*sizes, (32, 32), [140, 140], [40, 40])

    (parameters, flops), (usual, usual_flops) = cost(preset), cost("li_dit_1b")
    assert flops == usual_flops
    heads, width = PRESETS[preset].heads, 1152
    assert parameters - usual == 28 * 4 * (width // heads - 72)


@pytest.mark.parametrize(("preset", "wanted"), [("li_dit_1b", 0.93e9), ("li_dit_10b", 9.5e9)])
def test_presets_have_the_papers_sizes(preset, wanted):
    with torch.device("meta"):
        network = LIDiT(PRESETS[preset], FusionConfig(), [4096, 4096])
    dit = sum(
        parameter.numel() for name, parameter in network.named_parameters() if not name.startswith("fusion.")
    )
    assert dit == pytest.approx(wanted, rel=0.02)
    assert dit == count_parameters(PRESETS[preset], FusionConfig(), [4096, 4096])["dit"]
