import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.encoders.quantize import dequantize, quantize
from model.encoders.token_size import BITS, bytes_per_token

KINDS = sorted(BITS)
LOSSY = ["int4", "int6", "int8"]
WORST_ERROR = {"int8": 0.01, "int6": 0.04, "int4": 0.16}


def outlier_states(tokens, width, seed):
    """Return states like an LLM's: a few channels are hundreds of times the rest, means are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.where(torch.rand(width, generator=generator) < 0.02, 500.0, 1.0)
    shift = torch.randn(width, generator=generator) * gain * 3
    return torch.randn(tokens, width, generator=generator) * gain + shift


def channels(states):
    return states.mean(0), states.std(0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 20), width=st.integers(1, 70), seed=st.integers(0, 1000))
def test_sizes_and_round_trip(kind, tokens, width, seed):
    states = outlier_states(tokens + 50, width, seed)
    mean, std = channels(states)
    states = states[:tokens]
    values, scales, _ = quantize(states, kind, mean, std)
    assert values.dtype is torch.uint8
    assert values.shape == (tokens, bytes_per_token(kind, width))
    assert scales.shape == ((0,) if kind == "bf16" else (tokens,))
    assert scales.dtype is torch.float32
    standard = (states - mean) / std
    stored = dequantize(values, scales, kind, mean, std, torch.float32)
    if kind == "bf16":
        torch.testing.assert_close(stored, (states.bfloat16().float() - mean) / std)
        return
    half_step = standard.abs().amax(1, keepdim=True) / (2 ** (BITS[kind] - 1) - 1) / 2
    assert ((stored - standard).abs() <= half_step * 1.001 + 1e-6).all()


@pytest.mark.parametrize("kind", LOSSY)
def test_error_is_small_in_the_worst_channel(kind):
    states = outlier_states(4000, 640, seed=0)
    mean, std = channels(states[:2000])
    held_out = states[2000:]
    values, scales, outliers = quantize(held_out, kind, mean, std)
    error = dequantize(values, scales, kind, mean, std, torch.float32) - (held_out - mean) / std
    per_channel = error.square().mean(0).sqrt()
    assert per_channel.max() < WORST_ERROR[kind]
    assert outliers == 0


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_1e5_survive(kind):
    states = outlier_states(200, 64, seed=2) * 1e3
    states[3, 5] = 1e5
    states[7] = -1e5
    mean, std = channels(states)
    values, scales, _ = quantize(states, kind, mean, std)
    stored = dequantize(values, scales, kind, mean, std, torch.float32) * std + mean
    assert torch.isfinite(stored).all()
    tolerance = {"bf16": 0.01, "int8": 0.01, "int6": 0.05, "int4": 0.35}[kind]
    assert abs(stored[7].mean() + 1e5) < 1e5 * tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(bad):
    states = torch.ones(2, 4)
    states[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(states, "int8", torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_type(kind):
    states = outlier_states(6, 10, seed=3)
    values, scales, _ = quantize(states, kind, *channels(states))
    assert dequantize(values, scales, kind, *channels(states), torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", LOSSY)
def test_outliers_are_counted_and_not_clipped(kind):
    states = outlier_states(300, 64, seed=4)
    mean, std = channels(states)
    states[[5, 9], 3] = mean[3] + std[3] * torch.tensor([-40.0, 9.0])
    values, scales, outliers = quantize(states, kind, mean, std)
    assert outliers == 2
    stored = dequantize(values, scales, kind, mean, std, torch.float32)
    torch.testing.assert_close(stored[[5, 9], 3], torch.tensor([-40.0, 9.0]), rtol=1e-3, atol=0)
    half_step = scales[5] / 2
    assert ((stored[5] - (states[5] - mean) / std).abs() <= half_step * 1.001).all()
