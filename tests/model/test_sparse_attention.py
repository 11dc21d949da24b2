"""Block-sparse self-attention: dense if all tiles are kept, its own tile always, shifts as rolled tiles."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_config import AttentionConfig
from model.common.errors import UserError
from model.condition import Condition
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.flops import flops_per_sample
from model.functional import attention
from model.layers import SelfAttention
from model.region import ExampleSizes, TextLengths
from model.sparse_attention import (
    SparseSelfAttention,
    Tiles,
    attend_flex,
    attend_gathered,
    choose_tiles,
    flex_mask,
)
from tests.helpers.networks import SMALL, WIDTHS, normal, random_inputs, randomise

grids = st.tuples(st.integers(4, 11), st.integers(4, 11))


def layers(keep, block=4, shift=True, width=8, heads=2):
    config = AttentionConfig("block_sparse", block, keep, shift)
    sparse = randomise(SparseSelfAttention(width, heads, config))
    dense = SelfAttention(width, heads).double()
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


@settings(max_examples=30, deadline=None)
@given(grids, st.integers(2, 5), st.integers(0, 2))
def test_tiles_hold_each_patch_once(grid, side, shift):
    tiles = Tiles(*grid, side, shift)
    x = normal(2, grid[0] * grid[1], 3, 5)
    cut = tiles.cut(x)
    assert torch.equal(tiles.join(cut), x)
    places = tiles.patches(x.device)
    assert places.sum() == x.shape[1]
    assert not cut.movedim(1, -1)[:, ~places].any()
    assert places.all() == tiles.is_filled


@settings(max_examples=15, deadline=None)
@given(grids, st.booleans())
def test_all_tiles_are_dense_attention(grid, shifted):
    sparse, dense = layers(keep=1.0)
    x = normal(2, grid[0] * grid[1], 8)
    assert torch.equal(sparse.forward_tiles(x, *grid, shifted), dense(x))

    # and so is the path of the few, if it is given all
    tiles = Tiles(*grid, 4, 2 * shifted)
    q, k, v = normal(3, 2, x.shape[1], 2, 4).unbind()
    cut, filled = [tiles.cut(part) for part in (q, k, v)], tiles.patches(x.device)
    chosen = choose_tiles(*cut[:2], filled, len(filled))
    out = tiles.join(attend_gathered(*cut, chosen, filled)).flatten(2)
    assert torch.allclose(out, attention(q, k, v), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(grids, st.integers(1, 3))
def test_each_tile_chooses_itself_and_the_best_others(grid, count):
    tiles = Tiles(*grid, 4, 0)
    q, k = (tiles.cut(part) for part in normal(2, 3, grid[0] * grid[1], 2, 4).unbind())
    filled = tiles.patches(q.device)
    count = min(count, len(filled))
    chosen = choose_tiles(q, k, filled, count)
    assert (chosen == torch.arange(len(filled))[:, None]).any(-1).all()
    assert (chosen.diff(dim=-1) > 0).all()
    # by hand: means over the patches of a tile
    query, key = (part.sum(3) / filled.sum(1)[:, None] for part in (q, k))
    scores = torch.einsum("bhtd,bhsd->bhts", query, key)
    picked = scores.gather(3, chosen)
    left = scores.scatter(3, chosen, -torch.inf).amax(-1, keepdim=True)
    own = chosen == torch.arange(len(filled))[:, None]
    assert ((picked > left) | own).all()
    # no sample depends on the others
    assert torch.equal(choose_tiles(q.flip(0), k.flip(0), filled, count), chosen.flip(0))


def by_hand(sparse, x, grid, shift):
    """The layer with loops, for a grid of whole tiles."""
    side, heads = sparse.config.block, sparse.heads
    q, k, v = sparse.query_key_value(x).unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = sparse.query_norm(q), sparse.key_norm(k)
    place = torch.arange(len(x[0])).view(grid).roll((-shift, -shift), (0, 1))
    tiles = [
        place[r : r + side, c : c + side].flatten()
        for r in range(0, grid[0], side)
        for c in range(0, grid[1], side)
    ]
    count, out = sparse.config.kept(len(tiles)), torch.empty_like(q)
    for sample in range(len(x)):
        for head in range(heads):
            means = [[part[sample, tile, head].mean(0) for tile in tiles] for part in (q, k)]
            for number, tile in enumerate(tiles):
                scores = torch.stack([means[0][number] @ key for key in means[1]])
                scores[number] = torch.inf
                keys = torch.cat([tiles[other] for other in scores.topk(count).indices.sort().values])
                weights = (q[sample, tile, head] @ k[sample, keys, head].T * q.shape[-1] ** -0.5).softmax(-1)
                out[sample, tile, head] = weights @ v[sample, keys, head]
    return sparse.out(out.flatten(2))


@pytest.mark.parametrize("shifted", [False, True])
def test_the_layer_is_what_it_says(shifted):
    sparse, _ = layers(keep=0.4)
    x = normal(2, 8 * 12, 8)
    out = sparse.forward_tiles(x, 8, 12, shifted)
    assert torch.allclose(out, by_hand(sparse, x, (8, 12), 2 * shifted), atol=1e-12)
    # a shift by half a tile is a roll of the patches
    rolled = x.view(2, 8, 12, 8).roll((-2, -2), (1, 2)).flatten(1, 2)
    plain = sparse.forward_tiles(rolled, 8, 12, False).view(2, 8, 12, 8).roll((2, 2), (1, 2)).flatten(1, 2)
    assert torch.equal(plain, sparse.forward_tiles(x, 8, 12, True))
    still = SparseSelfAttention(8, 2, replace(sparse.config, shift=False)).double()
    still.load_state_dict(sparse.state_dict())
    assert torch.equal(still.forward_tiles(x, 8, 12, True), still.forward_tiles(x, 8, 12, False))


def test_gradients_are_those_of_the_function():
    sparse, _ = layers(keep=0.3, block=2)
    x = normal(1, 5 * 6, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparse.forward_tiles(x, 5, 6, True), x)


@pytest.mark.parametrize("grid", [(8, 12), (7, 10)])
def test_flex_attention_reads_the_same_tiles(grid):
    tiles = Tiles(*grid, 4, 2)
    q, k, v = (tiles.cut(part) for part in normal(3, 2, grid[0] * grid[1], 2, 4).float().unbind())
    filled = tiles.patches(q.device)
    chosen = choose_tiles(q, k, filled, 2)
    seen = None if tiles.is_filled else filled
    picked = torch.zeros(2, 2, len(filled), len(filled), dtype=torch.int32).scatter(3, chosen, 1)
    assert torch.equal(flex_mask(chosen, seen, 16).to_dense(), picked)
    out = attend_flex(q, k, v, chosen, seen, compiled=False)
    assert torch.allclose(tiles.join(out), tiles.join(attend_gathered(q, k, v, chosen, seen)), atol=1e-5)


SPARSE = replace(SMALL, attention=AttentionConfig("block_sparse", keep=0.2))


def test_a_network_with_it_runs_and_differs_in_attention_alone():
    side = 32 * SMALL.patch
    latents, timesteps, texts = random_inputs(height=side, width=side)
    condition = Condition(timesteps, texts)
    networks = {}
    for keep in (1.0, 0.2):
        sizes = replace(SPARSE, attention=AttentionConfig("block_sparse", keep=keep))
        networks[keep] = randomise(LIDiT(sizes, FusionConfig(), WIDTHS[:2]))
    dense = randomise(LIDiT(SMALL, FusionConfig(), WIDTHS[:2]))
    assert list(dense.state_dict()) == list(networks[0.2].state_dict())
    assert torch.equal(networks[1.0](latents, condition), dense(latents, condition))
    sparse = networks[0.2]
    assert not torch.allclose(sparse(latents, condition), dense(latents, condition))
    sparse.train().checkpoint_every = 1
    assert torch.equal(sparse(latents, condition), sparse.eval()(latents, condition))

    small = latents[..., : 8 * SMALL.patch, : 8 * SMALL.patch]
    with pytest.raises(UserError, match="8 x 8 are 64 patches, and below 1,024 dense attention costs less"):
        sparse(small, condition)
    with pytest.raises(UserError, match="for images, not for clips"):
        SPARSE.attention.check((4, 32, 32))


def test_compiled_blocks_have_one_graph_for_each_shift():
    network = randomise(LIDiT(SPARSE, FusionConfig(), WIDTHS[:2])).float()
    block = network.blocks[0]
    examples = block.example_inputs(ExampleSizes(1, (36, 32), TextLengths(8), padded=False))
    torch._dynamo.reset()
    explained = []
    for x, text, mask, c, *positions in examples:
        x, text, c = (value + torch.randn_like(value) for value in (x, text, c))
        explained.append(torch._dynamo.explain(block.forward)(x, text, mask, c, *positions))
    assert [(each.graph_count, each.graph_break_count) for each in explained] == [(1, 0)] * 2


def test_the_loop_over_tiles_is_in_no_graph():
    q, k, v = normal(3, 1, 2, 24, 4, 8).unbind()  # more tiles than are copied at once
    chosen = choose_tiles(q, k, torch.ones(24, 4, dtype=torch.bool), 3)
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(attend_gathered)(q, k, v, chosen, None)
        (graph,) = explained.graphs
        products = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        assert len(products) == 1
        compiled = torch.compile(attend_gathered, backend="eager")(q, k, v, chosen, None)
        assert torch.allclose(compiled, attend_gathered(q, k, v, chosen, None), atol=1e-12)


@pytest.mark.parametrize("block", [2, 3, 6, 12])
def test_tiles_that_a_gpu_has_no_kernel_for_are_refused_there(block):
    config = AttentionConfig("block_sparse", block)
    with pytest.raises(UserError, match="on a GPU a tile has a power of two of patches"):
        config.check_device("cuda")
    config.check_device("cpu")
    replace(config, kind="dense").check_device("cuda")
    for good in (4, 8, 16, 32, 64):
        replace(config, block=good).check_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("ragged", [0, 3])
def test_compiled_flex_attention_is_the_gathered_one_on_a_gpu(block, ragged):
    tiles = Tiles(6 * block - ragged, 5 * block, block, block // 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, tiles.rows * tiles.columns, 4, 64, generator=generator).bfloat16().cuda()
    results = []
    for attend, kind in ((attend_flex, torch.bfloat16), (attend_gathered, torch.float32)):
        leaf = x.to(kind, copy=True).requires_grad_()
        q, k, v = (tiles.cut(part) for part in leaf.unbind())
        filled = tiles.patches(x.device)
        # both choose by the same numbers
        chosen = choose_tiles(*(part.bfloat16() for part in (q, k)), filled, 7)
        out = tiles.join(attend(q, k, v, chosen, None if tiles.is_filled else filled))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
        (gradient,) = torch.autograd.grad((out.float() * weights).sum(), leaf)
        results.append((out.float(), gradient.float()))
    for flex, gathered in zip(*results, strict=True):
        assert (flex - gathered).norm() < 0.02 * gathered.norm()
        torch.testing.assert_close(flex, gathered, rtol=0.05, atol=0.05)


def test_its_flops_and_settings_are_counted():
    latents = (64 * SMALL.patch, 64 * SMALL.patch)
    flops = [
        flops_per_sample(sizes, FusionConfig(), WIDTHS[:2], latents, [4, 4]) for sizes in (SMALL, SPARSE)
    ]
    patches, kept = 64 * 64, round(0.2 * 64) * 64
    assert flops[0] - flops[1] == 12 * SMALL.depth * SMALL.width * patches * (patches - kept)
    # an export's config has it as a mapping
    again = DiTConfig(**{**vars(SPARSE), "attention": vars(SPARSE.attention)})
    assert again == SPARSE
