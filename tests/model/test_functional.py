import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.functional import (
    attention,
    key_mask,
    masked_mean,
    patchify,
    timestep_features,
    unpatchify,
    velocity_to,
)
from tests.helpers.networks import close, few, normal


@few
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_patchify_cuts_row_by_row_and_is_undone(rows, columns, patch, channels):
    latents = normal(2, channels, rows * patch, columns * patch)
    patches = patchify(latents, (patch, patch))
    assert patches.shape == (2, rows * columns, patch * patch * channels)
    lowest_left = latents[:, :, -patch:, :patch].flatten(1)
    assert torch.equal(patches[:, (rows - 1) * columns].sort().values, lowest_left.sort().values)
    assert torch.equal(unpatchify(patches, (patch, patch), (rows * patch, columns * patch)), latents)


@few
@given(st.integers(0, 10_000))
def test_attention_is_the_formula_and_never_nan(seed):
    q, k, v = (normal(3, length, 2, 4, seed=seed + i) for i, length in enumerate((5, 6, 6)))
    mask = normal(3, 6, seed=seed) > 0
    mask[2] = False
    shown = key_mask(mask)
    wanted_mask = mask.clone()
    wanted_mask[:, 0] |= ~mask.any(1)
    assert torch.equal(shown, wanted_mask[:, None, None])
    weights = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(4)
    weights = weights.masked_fill(~shown, -math.inf).softmax(-1)
    wanted = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
    assert close(attention(q, k, v, shown), wanted)


def test_attention_keeps_the_type_and_is_as_good_as_bf16_allows():
    q, k, v = (normal(2, 7, 2, 8, seed=i) for i in range(3))
    got = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - attention(q, k, v)).abs().max() < 0.03


def test_masked_mean_reads_only_what_the_mask_shows():
    x, mask = normal(2, 4, 3), torch.tensor([[True, True, False, False], [False] * 4])
    x[:, 2:] = math.nan
    mean = masked_mean(x, mask)
    assert close(mean[0], x[0, :2].mean(0))
    assert not mean[1].any()


def test_timesteps_stay_fp32_and_apart():
    features = timestep_features(torch.tensor([0.9990, 0.9991]), 16)
    assert features.dtype == torch.float32
    assert (features[0] - features[1]).abs().max() > 0.02
    wanted = [math.cos(999.0 * 10_000 ** (-i / 8)) for i in range(8)] + [
        math.sin(999.0 * 10_000 ** (-i / 8)) for i in range(8)
    ]
    assert torch.allclose(features[0], torch.tensor(wanted), atol=1e-3)


@few
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(1, 3))
def test_the_velocity_to_clean_latents_is_that_of_the_line_through_the_noisy_ones(times, branches):
    clean, noise = normal(len(times), 2, 3, 4).float(), normal(len(times), 2, 3, 4, seed=1).float()
    t = torch.tensor(times)
    mix = t.view(-1, 1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise
    velocity = velocity_to(clean.repeat(branches, 1, 1, 1), noisy, t.repeat(branches))
    torch.testing.assert_close(
        velocity, (noise - clean).repeat(branches, 1, 1, 1), atol=1e-4 / min(times), rtol=0
    )
