import torch
from hypothesis import given
from hypothesis import strategies as st

from model.token_refiner import TokenRefiner
from tests.helpers.networks import close, few, normal, randomise

full_mask = torch.ones(2, 7, dtype=torch.bool)


def refiner(blocks=2, gate=True, causal=False):
    return TokenRefiner(width=32, heads=2, hidden=64, blocks=blocks, gate=gate, causal=causal)


@few
@given(st.integers(1, 3), st.booleans(), st.integers(0, 10_000))
def test_is_the_identity_before_training(blocks, causal, seed):
    x = normal(2, 7, 32, seed=seed).float()
    assert torch.equal(refiner(blocks, causal=causal)(x, full_mask, normal(2, 32, seed=seed).float()), x)


def test_without_gates_is_not_the_identity():
    x = normal(2, 7, 32)
    assert refiner(gate=False).blocks[0].gates is None
    assert not close(refiner(gate=False).double()(x, full_mask, normal(2, 32)), x)


@few
@given(st.integers(0, 6), st.integers(0, 10_000))
def test_a_token_reaches_every_token_or_under_causal_attention_the_later_ones(changed, seed):
    x, c = normal(2, 7, 32, seed=seed), normal(2, 32, seed=seed + 1)
    other = x.clone()
    other[:, changed] += 1
    for causal in (False, True):
        refine = randomise(refiner(causal=causal), seed)
        moved = (refine(x, full_mask, c) - refine(other, full_mask, c)).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [not causal or position >= changed for position in range(7)]


@few
@given(st.lists(st.integers(1, 7), min_size=2, max_size=2), st.booleans())
def test_padding_changes_no_token(lengths, causal):
    refine, c = randomise(refiner(causal=causal)), normal(2, 32)
    x = normal(2, 7, 32)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    together = refine(x.masked_fill(~mask[..., None], 99), mask, c)
    for row, length in enumerate(lengths):
        alone = refine(x[row : row + 1, :length], None, c[row : row + 1])
        assert close(together[row, :length], alone[0])


@few
@given(st.integers(1, 3), st.integers(0, 7), st.booleans(), st.integers(1, 7))
def test_what_is_cut_off_changes_nothing_in_what_stays(blocks, first, causal, length):
    refine, c = randomise(refiner(blocks, causal=causal)), normal(2, 32)
    x, mask = normal(2, 7, 32), torch.arange(7) < torch.tensor([7, length])[:, None]
    stays = mask[:, first:, None]
    assert close(refine(x, mask, c, first).where(stays, 0), refine(x, mask, c)[:, first:].where(stays, 0))


def test_gates_follow_the_condition():
    refine, x = randomise(refiner()), normal(2, 7, 32)
    assert not close(refine(x, full_mask, normal(2, 32)), refine(x, full_mask, normal(2, 32, seed=1)))
