"""Moving averages: the formula, the warm-up, and that a swap leaves no trace."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.ema import ShardedEMA, warm_decay

DECAYS = st.floats(0.5, 0.99999)


@given(DECAYS, st.integers(0, 10**7))
def test_the_decay_grows_from_a_tenth_to_its_setting(decay, updates):
    now, later = warm_decay(decay, updates), warm_decay(decay, updates + 1)
    assert 0.1 <= now <= later <= decay
    assert warm_decay(decay, 10**9) == decay


@given(DECAYS, st.integers(0, 2**31), st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_the_average_is_the_weighted_sum_of_the_masters(decay, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    master_weights = [torch.randn(5, generator=generator), torch.randn(3, generator=generator)]
    average = ShardedEMA(decay, master_weights)
    expected = [master.double() for master in master_weights]
    for step in range(steps):
        for master, value in zip(master_weights, expected, strict=True):
            master.add_(torch.randn(master.shape, generator=generator))
            value += (1 - warm_decay(decay, step)) * (master - value)
        average.update(step)
    for got, value in zip(average.averages, expected, strict=True):
        torch.testing.assert_close(got, value.float(), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_two_swaps_change_nothing_and_reset_starts_from_the_masters(seed):
    torch.manual_seed(seed)
    master_weights = [torch.randn(7), torch.randn(2)]
    average = ShardedEMA(0.9, master_weights)
    master_weights[0].add_(1)
    before = [[tensor.clone() for tensor in tensors] for tensors in (master_weights, average.averages)]
    average.swap()
    assert all(map(torch.equal, master_weights, before[1]))
    average.swap()
    assert all(map(torch.equal, master_weights, before[0]))
    assert all(map(torch.equal, average.averages, before[1]))
    average.reset()
    assert all(map(torch.equal, average.averages, master_weights))
