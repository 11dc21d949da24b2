"""Latents families: what is stored is what the VAE says, in the order of the pairs."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.config import LatentsConfig
from data_prep.dataset.schema import LATENT_COLUMNS
from data_prep.families.latents import decode_images, encode_pairs, latents_family, to_pixels
from data_prep.pairs.pairs import Pair
from data_prep.workers import Workers
from model.common.errors import UserError
from model.encoders.vae import VAE, small_vae


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    module = small_vae().eval().requires_grad_(False)
    module.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    return VAE(module, "0" * 64)


def make_pairs(count: int, height: int = 16, width: int = 24) -> list[Pair]:
    pairs = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        pairs.append(Pair(number * 7, f"key{number}", data.getvalue(), [("original", "noise")], height, width))
    return pairs


def decoders(processes: int = 0) -> Workers:
    return Workers(decode_images, None, lambda _: pytest.fail("lost"), processes)


def unpack(data: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(shape).float()


@given(st.integers(1, 9), st.integers(1, 5))
@settings(deadline=None, max_examples=4)
def test_rows_are_the_moments_of_each_image_whatever_the_batch(vae, count, batch):
    pairs = make_pairs(count)
    with decoders() as workers:
        rows, counts = encode_pairs(vae, pairs, batch, workers)
    assert [row["id"] for row in rows] == [pair.id for pair in pairs]
    assert all(row.keys() == LATENT_COLUMNS.keys() for row in rows)
    for pair, row in zip(pairs, rows, strict=True):
        pixels = to_pixels(np.array(Image.open(io.BytesIO(pair.image)))[None], torch.device("cpu"))
        mean, std = vae.encode(pixels)
        torch.testing.assert_close(unpack(row["mean"], (16, 2, 3)), mean[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(unpack(row["std"], (16, 2, 3)), std[0], atol=1e-2, rtol=1e-2)
    stored = (torch.stack([unpack(row["mean"], (16, 2, 3)) for row in rows]) - 0.5) * 2.0
    assert counts["latent_mean"] == pytest.approx(stored.mean().item(), abs=0.02)
    assert counts["latent_std"] == pytest.approx(stored.std().item(), abs=0.02)


def test_worker_processes_give_the_same_rows(vae):
    pairs = make_pairs(5)
    with decoders(2) as parallel, decoders() as here:
        assert encode_pairs(vae, pairs, 2, parallel) == encode_pairs(vae, pairs, 2, here)


def test_the_extremes_of_a_pixel_are_those_of_the_vae():
    pixels = to_pixels(np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(3, 3), torch.device("cpu"))
    assert pixels.shape == (1, 3, 1, 2)
    assert pixels.unique().tolist() == [-1, 1]


def test_the_family_names_the_vae_but_is_not_identified_by_its_place(vae):
    here, there = (latents_family(LatentsConfig("latents", place), vae) for place in ("here", "there"))
    assert here.hash == there.hash
    assert here.info["vae"] == "here"
    assert (here.info["channels"], here.info["downsampling"]) == (16, 8)
    assert (here.info["scaling_factor"], here.info["shift_factor"]) == (2.0, 0.5)


def test_a_bucket_that_the_vae_cannot_divide_is_refused(vae):
    with decoders() as workers, pytest.raises(UserError, match=r"buckets\.step"):
        encode_pairs(vae, make_pairs(1, 12, 16), 4, workers)


def test_an_image_of_another_size_than_its_bucket_is_an_error(vae):
    pairs = make_pairs(2)
    wrong = Pair(1, "wrong", pairs[0].image, [], 32, 32)
    with decoders() as workers, pytest.raises(ValueError, match="wrong"):
        encode_pairs(vae, [wrong], 4, workers)


def test_moments_that_are_not_finite_are_an_error(vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda pixels: (torch.full((1, 16, 2, 3), torch.nan), torch.ones(1, 16, 2, 3)))
    with decoders() as workers, pytest.raises(ValueError, match="not finite near sample key0"):
        encode_pairs(vae, make_pairs(1), 4, workers)
