"""Pixels as a latent space: images come back as they were."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.families.latents import to_pixels
from model.encoders.latent_spaces import load_latent_space, normalize_latents
from model.encoders.pixels import PIXELS

CPU = torch.device("cpu")


@given(st.integers(1, 3), st.sampled_from([(2, 3), (4, 2, 3)]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_images_and_clips_come_back_from_stored_latents(count, axes, seed):
    space = load_latent_space("", None, CPU, PIXELS)
    raw = torch.rand(count, 3, *axes, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    mean, std = space.encode(raw)
    assert not std.any()
    # Families store bf16, whose steps near 1 are half a level of 255.
    latents = normalize_latents(mean.bfloat16().float(), space.statistics)
    assert (space.decode(latents) - raw).abs().max() <= 0.5 / 127.5


def test_the_values_are_those_of_the_image():
    space = load_latent_space("", None, CPU, PIXELS)
    image = np.array([[[[0, 127, 255]]]], np.uint8)
    mean, _ = space.encode(to_pixels(image, CPU))
    torch.testing.assert_close(mean.flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))
    assert space.identity == {"space": "pixels"}
