"""Elastic networks: parts are networks of their own, bit for bit, and the full one is the plain network."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from model.common.errors import UserError
from model.condition import Condition
from model.config import FusionConfig
from model.dit import LIDiT
from model.elastic.config import ElasticConfig, kept_blocks
from model.elastic.network import ElasticLIDiT
from model.elastic.weights import GrownWeights, plain_network
from model.functional import patchify
from model.rotary import rotation_table
from model.sub_network import PatchSchedule, SubNetwork
from tests.helpers.networks import SMALL, WIDTHS, normal, random_inputs, randomise

SIZES = replace(SMALL, depth=5)
ELASTIC = ElasticConfig(depths=[5, 3, 2], patches=[SIZES.patch, 2 * SIZES.patch])
PARTS = ELASTIC.parts(SIZES)


ROPE = replace(SIZES, position="rope")


def elastic_network(sizes=SIZES, elastic=ELASTIC, every=0):
    return randomise(ElasticLIDiT(sizes, FusionConfig(), WIDTHS[:2], elastic, every))


def inputs():
    side = 4 * SIZES.patch
    latents, timesteps, texts = random_inputs(height=side, width=side)
    return latents, Condition(timesteps, texts)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=6, unique=True))
def test_depths_are_nested_and_keep_the_ends(depths):
    depths = sorted(depths, reverse=True)
    kept = kept_blocks(depths)
    before = set(range(depths[0]))
    for depth in depths:
        blocks = kept[depth]
        assert len(blocks) == len(set(blocks)) == depth
        assert blocks == sorted(blocks)
        assert set(blocks) <= before
        assert (blocks[0], blocks[-1]) == (0, depths[0] - 1)
        before = set(blocks)


@pytest.mark.parametrize("sizes", [SIZES, ROPE], ids=["convolution", "rope"])
def test_the_full_network_starts_and_computes_as_the_plain_one(sizes):
    torch.manual_seed(3)
    plain = LIDiT(sizes, FusionConfig(), WIDTHS[:2])
    torch.manual_seed(3)
    elastic = ElasticLIDiT(sizes, FusionConfig(), WIDTHS[:2], ELASTIC)
    own = elastic.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items())
    assert all(name.startswith("elastic.") for name in set(own) - set(plain.state_dict()))

    elastic = elastic_network(sizes)
    plain = plain.double().eval()
    plain.load_state_dict({name: elastic.state_dict()[name] for name in plain.state_dict()})
    latents, condition = inputs()
    for part in (None, SubNetwork(SIZES.depth, SIZES.patch)):
        outputs = [plain(latents, condition), elastic(latents, replace(condition, part=part))]
        assert torch.equal(*outputs)
        gradients = []
        for network, output in zip((plain, elastic), outputs, strict=True):
            parameters = [network.get_parameter(name) for name, _ in plain.named_parameters()]
            gradients.append(torch.autograd.grad(output.square().sum(), parameters, allow_unused=True))
        pairs = zip(*gradients, strict=True)
        assert all((one is None and other is None) or torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("sizes", [SIZES, ROPE], ids=["convolution", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_is_a_plain_network_bit_for_bit(part, dtype, sizes):
    elastic = elastic_network(sizes).to(dtype)
    plain = plain_network(elastic, part.depth, part.patch)
    assert type(plain) is LIDiT
    assert (plain.sizes.depth, plain.sizes.patch, len(plain.blocks)) == (part.depth, part.patch, part.depth)
    latents, condition = inputs()
    latents = latents.to(dtype)
    condition.texts = [text.to("cpu", dtype) for text in condition.texts]
    assert torch.equal(plain(latents, condition), elastic(latents, replace(condition, part=part)))
    scaled = sizes.position == "rope" and part.patch > sizes.patch
    assert plain.sizes.position_scale == (part.patch // sizes.patch if scaled else 1)


def test_a_larger_patch_has_the_mean_position_of_those_that_it_covers():
    rows, columns, ratio = 3, 2, 2
    coarse = rotation_table((rows, columns), 16, scale=ratio)
    fine = rotation_table((rows * ratio, columns * ratio), 16)
    # the mean of a circle's points that are even about an angle has this angle
    cells = fine.view(2, rows, ratio, columns, ratio, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(coarse, cells / cells.norm(dim=0))
    assert not torch.allclose(coarse, rotation_table((rows, columns), 16))
    assert ROPE.with_patch(4).with_patch(8) == ROPE.with_patch(8)
    # the blocks of a part read them
    network = elastic_network(ROPE)
    seen = []
    network.blocks[0].register_forward_hook(lambda block, given, out: seen.append(given[-1]))
    latents, condition = inputs()
    network(latents, replace(condition, part=SubNetwork(5, 2 * SIZES.patch)))
    assert torch.equal(seen[0], rotation_table((2, 2), 16, scale=2))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_what_a_part_leaves_out_has_no_gradient(part):
    network = elastic_network()
    latents, condition = inputs()
    network(latents, replace(condition, part=part)).square().sum().backward()
    used = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    for number in range(SIZES.depth):
        inside = any(name.startswith(f"blocks.{number}.") for name in used)
        assert inside == (number in network.kept[part.depth])
    own = any(name.startswith("elastic.") for name in used)
    assert own == (part.patch != SIZES.patch) == ("patch_embedding.weight" not in used)


def test_recomputed_blocks_are_counted_in_the_order_of_a_part():
    latents, condition = inputs()
    part = SubNetwork(3, SIZES.patch)
    plain, recomputing = elastic_network().train(), elastic_network(every=2).train()
    seen = []
    recomputing.recompute = lambda block, *given: (
        seen.append(block) or LIDiT.recompute(recomputing, block, *given)
    )
    outputs = [network(latents, replace(condition, part=part)) for network in (plain, recomputing)]
    assert torch.equal(*outputs)
    assert seen == [recomputing.blocks[recomputing.kept[3][1]]]
    gradients = []
    for network, output in zip((plain, recomputing), outputs, strict=True):
        output.square().sum().backward()
        gradients.append(network.blocks[0].mlp.up.weight.grad)
    assert torch.equal(*gradients)


def grown():
    plain = randomise(LIDiT(SIZES, FusionConfig(), WIDTHS[:2]))
    network = elastic_network()
    network.load_state_dict(GrownWeights(plain.state_dict(), SIZES, ELASTIC))
    return plain, network.double()


def test_larger_patches_start_from_the_smaller_ones():
    plain, network = grown()
    coarse, fine = 2 * SIZES.patch, SIZES.patch
    small = normal(2, SIZES.channels, 2 * fine, 3 * fine)
    constant = interpolate(small, scale_factor=2, mode="nearest")  # in each 2 x 2 cell
    own = network.elastic[str(coarse)]
    embedded = own.patch_embedding(patchify(constant, (coarse, coarse)))
    assert torch.allclose(embedded, plain.patch_embedding(patchify(small, (fine, fine))), atol=1e-12)

    # a patch's values are those of the smaller patch, each in a cell of 2 x 2
    hidden = normal(1, 6, SIZES.width)
    values = plain.final.linear(hidden).unflatten(-1, (fine, fine, SIZES.channels))
    wide = values.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2)
    assert torch.allclose(own.linear(hidden), wide, atol=1e-12)
    assert not own.time_shift.vector.any()
    assert torch.equal(own.position.narrow.weight, plain.position.narrow.weight)


def test_grown_weights_know_their_shapes_and_keep_what_is_there():
    plain, network = grown()
    weights = GrownWeights(plain.state_dict(), SIZES, ELASTIC)
    assert {name: tuple(value.shape) for name, value in weights.items()} == weights.shapes
    assert list(weights) == list(dict.fromkeys(weights))
    assert len(weights) == len(network.state_dict())
    own = randomise(network, seed=5).state_dict()
    again = GrownWeights(own, SIZES, ELASTIC)
    assert set(again) == set(own)
    assert all(torch.equal(again[name], own[name]) for name in own)


def test_a_shift_of_zero_changes_nothing():
    _, network = grown()
    latents, condition = inputs()
    part = replace(condition, part=SubNetwork(SIZES.depth, 2 * SIZES.patch))
    before = network(latents, part)
    shifted = network.elastic[str(2 * SIZES.patch)].time_shift
    assert torch.equal(
        network.time_embedding(condition.timesteps, shifted()), network.time_embedding(condition.timesteps)
    )
    with torch.no_grad():
        shifted.vector += 0.1
    assert not torch.allclose(network(latents, part), before)


@given(st.floats(0, 1))
def test_a_schedule_has_coarse_patches_from_its_times_on(time):
    schedule = PatchSchedule(5, (1, 2, 4), (0.25, 0.5))
    assert schedule.at(time).patch == (1 if time < 0.25 else 2 if time < 0.5 else 4)
    condition = Condition(torch.zeros(2), [], part=schedule).at(time)
    assert condition.part == schedule.at(time)
    assert condition.at(0.0).part == condition.part


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"depths": [4, 2]}, "model.depth=5"),
        ({"depths": [5, 5]}, "elastic.depths"),
        ({"depths": [5, 1]}, "none below 2"),
        ({"patches": [2 * SIZES.patch]}, f"model.patch={SIZES.patch}"),
        ({"patches": [SIZES.patch, SIZES.patch]}, "rising multiples"),
        ({"sandwich": True}, "elastic.sandwich"),
        ({"depths": [5, 3], "distil": 0.5}, "elastic.sandwich=true"),
        ({"depths": [5, 3], "part_weight": 0.5}, "elastic.sandwich=true"),
        ({"depths": [5, 3], "segments": [0.5]}, "one fewer"),
        ({"patches": [SIZES.patch, 2 * SIZES.patch], "segments": [1.0]}, "rising times"),
        ({"patches": [SIZES.patch, 2 * SIZES.patch], "segments": [0.5], "sandwich": True}, "another depth"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        ElasticConfig(**settings).check(SIZES)


def test_parts_that_do_not_exist_are_refused():
    latents, condition = inputs()
    network = elastic_network()
    for part in (SubNetwork(4, SIZES.patch), SubNetwork(5, 3), PatchSchedule(5, (1, 2), (0.5,))):
        with pytest.raises(UserError, match="no such part"):
            network(latents, replace(condition, part=part))
    plain = plain_network(network)
    with pytest.raises(UserError, match="not elastic"):
        plain(latents, replace(condition, part=PARTS[0]))
    with pytest.raises(UserError, match="not elastic"):
        plain_network(plain, 3)
    assert plain_network(plain) is plain
    with pytest.raises(UserError, match="trained for depth 5, 3, 2"):
        plain_network(network, 4)
    segmented = elastic_network(elastic=replace(ELASTIC, segments=[0.5]))
    with pytest.raises(UserError, match="sample from the run"):
        plain_network(segmented)
