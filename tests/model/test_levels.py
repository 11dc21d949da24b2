"""Times that patches share, in the network: exact properties of the levels and of the difficulty head."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import functional
from model.common.errors import UserError
from model.condition import Condition, Levels
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.dit_block import DiTBlock
from model.flops import count_parameters, flops_per_sample
from model.functional import spread
from model.region import ExampleSizes, TextLengths
from pipeline.operations.planning import Setup, make_plan
from pipeline.stage.config import load_stage
from tests.helpers.networks import SMALL, WIDTHS, close, random_inputs, random_network

PATCHES = 6
"""Of the latents of `random_inputs` with patches of 2 x 2."""


def levels_of(places, times):
    return Levels(places, times.gather(1, places).mean(1))


def conditions(levels=3, lengths=(4, 2)):
    """Latents, and the same times as levels and as one time per patch."""
    latents, _, texts = random_inputs(lengths=lengths)
    rng = torch.Generator().manual_seed(1)
    times = torch.rand(len(lengths), levels, generator=rng)
    places = torch.randint(levels, (len(lengths), PATCHES), generator=rng)
    with_levels = Condition(times, texts, levels=levels_of(places, times))
    return latents, with_levels, Condition(times.gather(1, places), texts)


def gradients(network, latents, condition):
    network.zero_grad()
    result = network(latents, condition)
    result.square().mean().backward()
    return result.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}


def test_one_level_is_one_time_per_sample_bit_for_bit():
    network = random_network()
    latents, timesteps, texts = random_inputs()
    places = torch.zeros(2, PATCHES, dtype=torch.long)
    level = Condition(timesteps[:, None], texts, levels=Levels(places, timesteps))
    one, gradient = gradients(network, latents, Condition(timesteps, texts))
    same, same_gradient = gradients(network, latents, level)
    assert torch.equal(one, same)
    assert all(torch.equal(gradient[name], same_gradient[name]) for name in gradient)


def test_levels_are_the_times_of_the_patches():
    network = random_network()
    latents, levels, each = conditions()
    one, gradient = gradients(network, latents, each)
    same, same_gradient = gradients(network, latents, levels)
    assert close(one, same)  # products of other numbers of rows are rounded otherwise
    assert all(torch.allclose(gradient[name], same_gradient[name], rtol=1e-4, atol=1e-6) for name in gradient)


def test_equal_levels_are_one_time_to_rounding():
    network = random_network()
    latents, timesteps, texts = random_inputs()
    _, levels, _ = conditions()
    times = timesteps[:, None].repeat(1, 3)
    equal = Condition(times, texts, levels=levels_of(levels.levels.places, times))
    assert close(network(latents, equal), network(latents, Condition(timesteps, texts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spread_selects_exactly_and_its_gradient_is_a_sum(dtype):
    values = torch.randn(2, 4, 5).to(dtype).requires_grad_()
    places = torch.randint(4, (2, 7))
    one_hot = torch.nn.functional.one_hot(places, 4).to(dtype)
    result = spread(values, one_hot)
    rows = torch.arange(2)[:, None]
    assert torch.equal(result, values[rows, places])
    weights = torch.randint(-3, 4, result.shape).to(dtype)  # whole numbers add up exactly
    result.backward(weights)
    expected = torch.zeros_like(values).index_put((rows.expand(2, 7), places), weights, accumulate=True)
    assert torch.equal(values.grad, expected)


def test_patches_and_their_places_can_be_permuted_together(monkeypatch):
    network = random_network(patch=1)
    monkeypatch.setattr(network.position, "forward", lambda x, grid: x)
    latents, _, texts = random_inputs(height=1, width=6)
    times, places = torch.rand(2, 3), torch.randint(3, (2, 6))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    result = network(latents, Condition(times, texts, levels=levels_of(places, times)))
    permuted = Condition(times, texts, levels=levels_of(places[:, order], times))
    # norms are in fp32, whose sums have another order then
    assert torch.allclose(network(latents[..., order], permuted), result[..., order], rtol=1e-4, atol=1e-4)


def test_the_text_side_reads_one_time():
    network = random_network()
    latents, levels, _ = conditions()
    other = replace(levels, levels=replace(levels.levels, sample_times=levels.timesteps.amin(1)))
    assert not close(network(latents, levels), network(latents, other))
    without = random_network(FusionConfig(time=False))
    assert torch.equal(without(latents, levels), without(latents, other))


def test_levels_are_cut_by_sample():
    latents, levels, _ = conditions()
    network = random_network()
    whole = network(latents, levels)
    assert close(network(latents[1:], levels.rows(slice(1, 2))), whole[1:])
    assert levels.to("cpu").levels.places.equal(levels.levels.places)


# -- the head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", ["attached", "detached"])
def test_a_new_head_says_variance_one_and_changes_nothing(difficulty):
    network, plain = random_network(difficulty=difficulty), random_network()
    network.load_state_dict(plain.state_dict(), strict=False)
    network.final.difficulty.linear.reset_parameters()
    latents, levels, _ = conditions()
    both = network(latents, replace(levels, with_difficulty=True))
    assert both.shape[1] == latents.shape[1] + 1
    assert torch.equal(both[:, :-1], plain(latents, levels))
    assert not both[:, -1].any()
    assert torch.equal(network(latents, levels), plain(latents, levels))


def test_a_patch_has_one_log_variance_within_bounds():
    network = random_network(difficulty="attached")
    latents, levels, _ = conditions()
    values = network(latents, replace(levels, with_difficulty=True))[:, -1]
    cells = values.unflatten(1, (2, 2)).unflatten(3, (3, 2)).movedim(2, 3).flatten(3)
    assert torch.equal(cells, cells[..., :1].expand_as(cells))
    assert len(values.unique()) == 2 * PATCHES
    for sign, bound in ((1, 20.0), (-1, -30.0)):
        network.final.difficulty.linear.bias.data.fill_(sign * 1e6)
        assert (network(latents, replace(levels, with_difficulty=True))[:, -1] == bound).all()


@pytest.mark.parametrize(("difficulty", "reaches"), [("attached", True), ("detached", False)])
def test_a_detached_head_trains_itself_alone(difficulty, reaches):
    network = random_network(difficulty=difficulty)
    latents, levels, _ = conditions()
    network(latents, replace(levels, with_difficulty=True))[:, -1].sum().backward()
    trunk = [p.grad for name, p in network.named_parameters() if not name.startswith("final.difficulty")]
    assert any(gradient is not None and bool(gradient.any()) for gradient in trunk) == reaches
    assert network.final.difficulty.linear.weight.grad.any()


def test_a_network_without_a_head_says_how_to_get_one():
    latents, levels, _ = conditions()
    with pytest.raises(UserError, match=r"no difficulty head: train one with objective.difficulty=0.01"):
        random_network()(latents, replace(levels, with_difficulty=True))


# -- formulas ------------------------------------------------------------------------------------------------


def test_parameters_and_operations_by_formula():
    sizes = replace(SMALL, time_levels=3, difficulty="attached")
    fusion = FusionConfig()
    with torch.device("meta"):
        real = sum(p.numel() for p in LIDiT(sizes, fusion, WIDTHS[:2]).parameters())
    assert count_parameters(sizes, fusion, WIDTHS[:2])["total"] == real

    network = random_network(fusion, difficulty="attached").float()
    latents, levels, _ = conditions(lengths=(5, 5))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(latents, replace(levels, with_difficulty=True))
    tokens = [text.states.shape[1] for text in levels.texts]
    prefixes = [text.prefix for text in levels.texts]
    formula = flops_per_sample(sizes, fusion, WIDTHS[:2], (4, 6), tokens, prefixes)
    assert formula == 3 * counter.get_total_flops() / len(latents)


def test_activations_by_formula_are_what_autograd_keeps(monkeypatch):
    monkeypatch.setattr(functional, "CPU_HAS_BF16", True)  # products in bf16, as on a GPU
    sizes = DiTConfig(depth=1, width=64, heads=4, time_levels=8)
    block = DiTBlock(sizes).to(torch.bfloat16)
    [inputs] = block.example_inputs(ExampleSizes(2, (8, 16), TextLengths(32), padded=False))
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(*inputs)
    values = sum(storage.nbytes() for storage in kept.values()) / 2 / 2  # of 2 bytes, of 2 samples
    planned = DiTBlock.activations(sizes, 128, 32)
    assert planned == pytest.approx(values, rel=0.06)
    assert planned > 1.1 * DiTBlock.activations(replace(sizes, time_levels=1), 128, 32)


def test_the_estimate_counts_levels():
    plain, levels = load_stage("li_dit_1b_256"), load_stage("li_dit_1b_256_patch_times")
    plans = [make_plan(stage, Setup(64)) for stage in (plain, levels)]
    assert 1.0 < plans[1].flops_per_sample / plans[0].flops_per_sample < 1.06
    # a micro-batch has half of the samples
    assert plans[1].memory["activations"] > 1.1 * plans[0].memory["activations"] / 2
