"""Noise: each sample's own, on both kinds of devices, and one kernel on a GPU."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from pipeline.data import noise
from pipeline.data.noise import normal_numbers, philox, sample_noise, seeds_of

CPU = torch.device("cpu")


def as_on_a_gpu(device, shape, keys, stream):
    numbers = normal_numbers(seeds_of(keys, stream), int(np.prod(shape[1:])))
    return numbers.view(*shape)


@pytest.mark.parametrize("sample", [sample_noise, as_on_a_gpu])
def test_noise_is_the_samples_own(sample):
    def noise_of(ids, seed=1, epoch=2, stream="noise"):
        numbers = sample(CPU, [len(ids), 2, 8, 8], [(seed, epoch, id) for id in ids], stream)
        return dict(zip(ids, numbers, strict=True))

    one, other = noise_of([3, 4, 5]), noise_of([5, 3])
    assert all(torch.equal(one[id], other[id]) for id in other)
    variants = [
        one[3],
        one[4],
        noise_of([3], seed=2)[3],
        noise_of([3], epoch=3)[3],
        noise_of([3], stream="posterior_noise")[3],
    ]
    assert len({values.sum().item() for values in variants}) == len(variants)
    numbers = torch.stack(list(noise_of(list(range(100))).values()))
    assert numbers.dtype == torch.float32
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    assert kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3


# Known answers of the authors' Random123: counter, key, result.
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), ANSWERS)
def test_words_are_those_of_the_authors(counter, key, result):
    def pairs(text):
        words = np.array([int(word, 16) for word in text.split()], np.uint32)
        return torch.from_numpy(words.view(np.int64).copy())

    words = philox(*pairs(counter)[:, None], pairs(key))
    assert [f"{int(word):08x}" for word in words] == result.split()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40)
)
def test_more_numbers_begin_with_the_same(seeds, count, more):
    few = normal_numbers(torch.tensor(seeds), count)
    many = normal_numbers(torch.tensor(seeds), count + more)
    assert torch.equal(few, many[:, :count])
    assert many.isfinite().all()


HAS_COMPILER = shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()


@pytest.mark.skipif(not HAS_COMPILER, reason="what compiles a CPU's kernels is missing")
def test_it_compiles_to_one_kernel_for_all_shapes():
    torch._dynamo.reset()
    noise._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    torch._inductor.metrics.reset()
    for samples, count in ((8, 4096), (3, 1000), (16, 8192)):
        seeds = seeds_of([(1, 2, id) for id in range(samples)], "noise")
        compiled = noise._compiled()(seeds, count)
        torch.testing.assert_close(compiled, normal_numbers(seeds, count), rtol=1e-5, atol=1e-5)
    assert torch._inductor.metrics.generated_kernel_count == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
