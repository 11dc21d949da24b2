"""Latent spaces: statistics per channel or for all, downsampling per axis, and the registry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from model.encoders.latent_spaces import (
    LATENT_SPACES,
    LatentSpace,
    denormalize_latents,
    downsampling_per_axis,
    find_latent_space,
    load_latent_space,
    normalize_latents,
    register_latent_space,
)
from model.encoders.vae import VAE

SHAPES = [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 4, 5)]
MEAN, STD = (0.5, -2.0, 0.0), (2.0, 0.25, 1.0)


@given(st.floats(0.01, 10), st.floats(-5, 5), st.sampled_from(SHAPES))
@settings(deadline=None, max_examples=30)
def test_one_number_for_all_channels_gives_the_same_bits_as_before(scaling, shift, shape):
    raw, statistics = torch.randn(shape), {"scaling_factor": scaling, "shift_factor": shift, "channels": 3}
    assert torch.equal(normalize_latents(raw, statistics), (raw - shift) * scaling)
    assert torch.equal(denormalize_latents(raw, statistics), raw / scaling + shift)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_channel_has_its_own_mean_and_std(shape):
    raw, statistics = torch.randn(shape), {"latents_mean": list(MEAN), "latents_std": list(STD)}
    latents = normalize_latents(raw, statistics)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel] - mean) / std)
    torch.testing.assert_close(denormalize_latents(latents, statistics), raw)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_mean_and_std_hold_for_all_channels(shape):
    raw = torch.randn(shape)
    one = {"latents_mean": 0.5, "latents_std": 2.0}
    torch.testing.assert_close(normalize_latents(raw, one), (raw - 0.5) / 2.0)
    assert torch.equal(
        normalize_latents(raw, one), normalize_latents(raw, {key: [one[key]] * 3 for key in one})
    )
    torch.testing.assert_close(denormalize_latents(normalize_latents(raw, one), one), raw)


def test_statistics_of_another_number_of_channels_are_an_error():
    with pytest.raises(ValueError, match="latents_mean has 3 numbers for latents of 1 channels"):
        normalize_latents(torch.randn(2, 1, 4), {"latents_mean": MEAN, "latents_std": STD})


def test_downsampling_is_one_number_or_one_per_axis():
    assert downsampling_per_axis(8, 2) == (8, 8)
    assert downsampling_per_axis([4, 8, 8], 3) == (4, 8, 8)
    with pytest.raises(UserError, match=r"\[4, 8, 8\] cannot encode data of 2 axes"):
        downsampling_per_axis((4, 8, 8), 2)


def test_the_built_in_space_is_found_by_its_name_and_others_are_refused():
    assert find_latent_space("AutoencoderKL") is VAE
    with pytest.raises(UserError, match=r"AutoencoderDC is unknown.*AutoencoderKL"):
        load_latent_space("anywhere", None, torch.device("cpu"), "AutoencoderDC")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):

        @register_latent_space("AutoencoderKL")
        class Other(LatentSpace):
            pass

    assert LATENT_SPACES["AutoencoderKL"] is VAE
