import torch
from hypothesis import given
from hypothesis import strategies as st

from model.collaborative_refiner import CollaborativeRefiner
from tests.helpers.networks import close, few, normal, randomise

lengths = (7, 4, 5)


def refiner(branches=3, blocks=1):
    return CollaborativeRefiner(width=32, heads=2, hidden=64, branches=branches, blocks=blocks)


def inputs(branches=3, seed=0):
    tokens = [normal(2, length, 32, seed=seed + i) for i, length in enumerate(lengths[:branches])]
    return tokens, [normal(2, 32, seed=seed + 10 + i) for i in range(branches)]


@few
@given(st.integers(2, 3), st.integers(1, 3), st.integers(0, 3))
def test_only_cuts_the_prefix_before_training(branches, blocks, prefix):
    tokens, conditions = inputs(branches)
    out = refiner(branches, blocks).double()(tokens, None, conditions, [prefix] * branches)
    assert all(torch.equal(got, x[:, prefix:]) for got, x in zip(out, tokens, strict=True))


@few
@given(st.integers(1, 3), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_leaving_prefixes_out_of_the_last_block_changes_no_token(blocks, prefixes):
    refine, (tokens, conditions) = randomise(refiner(blocks=blocks)), inputs()
    whole = refine(tokens, None, conditions, [0, 0, 0])
    for got, x, prefix in zip(refine(tokens, None, conditions, prefixes), whole, prefixes, strict=True):
        assert close(got, x[:, prefix:])


@few
@given(st.integers(0, 2), st.integers(0, 3))
def test_a_token_reaches_the_other_branches_and_itself(branch, position):
    refine, (tokens, conditions) = randomise(refiner()), inputs()
    before = refine(tokens, None, conditions, [0, 0, 0])
    tokens[branch] = tokens[branch].clone()
    tokens[branch][:, position] += 1
    for own, (old, new) in enumerate(zip(before, refine(tokens, None, conditions, [0, 0, 0]), strict=True)):
        moved = (old - new).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [own != branch or place == position for place in range(lengths[own])]


def test_branches_run_side_by_side():
    refine, (tokens, conditions) = randomise(refiner()), inputs()
    before = refine(tokens, None, conditions, [0, 0, 0])
    randomise(refine.blocks[0].branches[0], seed=5)
    after = refine(tokens, None, conditions, [0, 0, 0])
    assert [close(old, new) for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_padding_changes_no_token():
    refine, (tokens, conditions) = randomise(refiner(blocks=2)), inputs()
    masks = [torch.arange(length) < torch.tensor([[2], [length - 1]]) for length in lengths]
    padded = [x.masked_fill(~mask[..., None], 99) for x, mask in zip(tokens, masks, strict=True)]
    together = refine(padded, masks, conditions, [0, 0, 0])
    for row in range(2):
        kept = [int(mask[row].sum()) for mask in masks]
        short = [x[row : row + 1, :length] for x, length in zip(tokens, kept, strict=True)]
        alone = refine(short, None, [c[row : row + 1] for c in conditions], [0, 0, 0])
        assert all(close(a[row, : b.shape[1]], b[0]) for a, b in zip(together, alone, strict=True))
