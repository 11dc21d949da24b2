"""Latents families: what is stored is what the VAE says, in the order of the pairs."""

import io
import json
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.clips.media import encode_clip
from data_prep.config import LatentsConfig
from data_prep.dataset.parts import register_family
from data_prep.dataset.schema import LATENT_COLUMNS, Family
from data_prep.families import latents
from data_prep.families.latents import (
    decode_images,
    encode_pairs,
    latents_family,
    open_latents,
    to_pixels,
)
from data_prep.pairs.pairs import Pair
from data_prep.store.store import open_store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.common.records import SEAL
from model.encoders.latent_spaces import AUTOENCODER_KL, normalize_latents, same_latents
from model.encoders.vae import VAE, small_vae
from tests.helpers.pixel_space import MEAN, STD, PixelSpace
from tests.helpers.raw_material import config_of

WRITTEN_BEFORE = (
    b'{"constants_xxh64":"","format":1,"hash":"5ca7844b4fc39139","identity":{"act_fn":"silu",'
    b'"block_out_channels":[16,32,64,64],"down_block_types":["DownEncoderBlock2D","DownEncoderBlock2D",'
    b'"DownEncoderBlock2D","DownEncoderBlock2D"],"in_channels":3,"latent_channels":16,"layers_per_block":1,'
    b'"mid_block_add_attention":false,"moments":"bf16","norm_num_groups":8,"use_quant_conv":true,'
    b'"vae":"AutoencoderKL",'
    b'"weights_sha256":"24080cbe8e8adf745877869c18c7cae9b54f6a838e0cceb7f3e3938d14a9bb47"},'
    b'"info":{"channels":16,"downsampling":8,"revision":null,"scaling_factor":1.5305,"shift_factor":0.0609,'
    b'"vae":"runs/vae"},"kind":"latents","name":"latents"}'
)
"""A family.json from before there were other latent spaces."""


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
        pairs.append(
            Pair(number * 7, f"key{number}", data.getvalue(), [("original", "noise")], height, width)
        )
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
    pixels = to_pixels(
        np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(3, 3), torch.device("cpu")
    )
    assert pixels.shape == (1, 3, 1, 2)
    assert pixels.unique().tolist() == [-1, 1]


def test_the_family_names_the_vae_but_is_not_identified_by_its_place(vae):
    here, there = (latents_family(LatentsConfig("latents", place), vae) for place in ("here", "there"))
    assert here.hash == there.hash
    assert here.info["vae"] == "here"
    assert (here.info["channels"], here.info["downsampling"]) == (16, 8)
    assert (here.info["scaling_factor"], here.info["shift_factor"]) == (2.0, 0.5)


def test_a_family_written_before_is_read_with_the_same_numbers_and_encoded_on(tmp_path):
    stored = Family.from_json(WRITTEN_BEFORE)
    assert stored.hash == "5ca7844b4fc39139"
    assert stored.identity.get("space", AUTOENCODER_KL) == "AutoencoderKL"
    raw = torch.randn(2, 16, 4, 4)
    assert torch.equal(normalize_latents(raw, stored.info), (raw - 0.0609) * 1.5305)

    module = small_vae()
    module.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    vae = VAE(module, "24080cbe8e8adf745877869c18c7cae9b54f6a838e0cceb7f3e3938d14a9bb47")
    family = latents_family(LatentsConfig("latents", "runs/vae"), vae)
    # new records have a seal, which is no part of what they say
    record = json.loads(family.to_json())
    assert record.pop(SEAL)
    assert record == json.loads(WRITTEN_BEFORE)
    dataset = open_store(str(tmp_path / "store"), create=True).sub("set")
    dataset.put_new(stored.key, WRITTEN_BEFORE)
    assert register_family(dataset, family, None) == stored


def test_a_space_of_another_name_is_part_of_the_identity_and_records_its_statistics():
    space = PixelSpace.load("", None, torch.device("cpu"))
    family = Family.from_json(latents_family(LatentsConfig("latents", space="toy_pixels"), space).to_json())
    assert family.identity == {"block": 8, "moments": "bf16", "space": "toy_pixels"}
    assert family.info["latents_mean"] == list(MEAN)
    assert family.info["latents_std"] == list(STD)
    assert (family.info["channels"], family.info["downsampling"]) == (192, [8, 8])
    assert not {"scaling_factor", "shift_factor"} & family.info.keys()


def test_rows_of_any_space_are_its_latents():
    space, pairs = PixelSpace.load("", None, torch.device("cpu")), make_pairs(3)
    with decoders() as workers:
        rows, counts = encode_pairs(space, pairs, 2, workers)
    raw = torch.stack([unpack(row["mean"], (192, 2, 3)) for row in rows])
    pixels = to_pixels(np.stack(decode_images(None, pairs)), space.device)
    torch.testing.assert_close(space.decode_raw(raw), pixels, atol=1e-2, rtol=1e-2)
    assert all(not any(row["std"]) for row in rows)
    assert counts["latent_std"] == pytest.approx(
        normalize_latents(raw, space.statistics).std().item(), abs=0.02
    )


def test_a_bucket_that_the_vae_cannot_divide_is_refused(vae):
    with decoders() as workers, pytest.raises(UserError, match=r"buckets\.step"):
        encode_pairs(vae, make_pairs(1, 12, 16), 4, workers)


def test_an_image_of_another_size_than_its_bucket_is_an_error(vae):
    pairs = make_pairs(2)
    wrong = Pair(1, "wrong", pairs[0].image, [], 32, 32)
    with decoders() as workers, pytest.raises(ValueError, match="wrong"):
        encode_pairs(vae, [wrong], 4, workers)


def test_moments_that_are_not_finite_are_an_error(vae, monkeypatch):
    monkeypatch.setattr(
        vae, "encode", lambda pixels: (torch.full((1, 16, 2, 3), torch.nan), torch.ones(1, 16, 2, 3))
    )
    with decoders() as workers, pytest.raises(ValueError, match="not finite near sample key0"):
        encode_pairs(vae, make_pairs(1), 4, workers)


@pytest.mark.parametrize("clip_format", ["mp4", "webp"])
def test_clips_in_a_space_of_images_end_with_one_line(vae, clip_format):
    """Not with the first frame of each, which an animated WebP would give without a word."""
    frames = np.zeros((5, 16, 32, 3), np.uint8)
    pair = Pair(0, "key", encode_clip(frames, 24, clip_format), [("original", "black")], 16, 32, 5, 24.0)
    with pytest.raises(UserError, match=r"bucket 16x32x5.*encodes images alone"):
        encode_pairs(vae, [pair], 2, decoders())


def test_bf16_is_compared_with_fp32_once_and_is_another_family(vae, tmp_path, capsys, monkeypatch):
    vae.module.save_pretrained(tmp_path / "vae", safe_serialization=True)
    config, pairs = config_of(tmp_path, ("folder", tmp_path)), make_pairs(3)
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")

    rows, families = {}, {}
    for dtype in ("fp32", "bf16"):
        chosen = LatentsConfig(dtype, str(tmp_path / "vae"), batch=2, dtype=dtype)
        with open_latents(config, chosen, dataset) as (families[dtype], encode_part):
            rows[dtype], _ = encode_part(pairs)
            assert encode_part(pairs)[0] == rows[dtype]
    assert families["bf16"].identity == {**families["fp32"].identity, "dtype": "bf16"}
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("latents family bf16: bf16 changes the means by ")

    exact, rough = (torch.stack([unpack(row["mean"], (16, 2, 3)) for row in rows[name]]) for name in rows)
    assert 0 < (rough - exact).square().mean().sqrt() < latents.MAX_BF16_ERROR * exact.std()
    # "dtype" is no key of the VAE's own identity, so the VAE in fp32 is the one that decodes them.
    own = json.loads(json.dumps(vae.identity)) | {"weights_sha256": ANY}
    assert same_latents(own, families["bf16"].identity)

    monkeypatch.setattr(latents, "MAX_BF16_ERROR", 1e-9)
    with (
        open_latents(config, chosen, dataset) as (_, encode_part),
        pytest.raises(UserError, match=r"of their std, more than 0%: set latents.dtype=fp32"),
    ):
        encode_part(pairs)


def test_pixels_have_no_bf16(tmp_path):
    config = config_of(tmp_path, ("folder", tmp_path))
    dataset = open_store(str(tmp_path / "store"), create=True).sub("ds")
    chosen = LatentsConfig("pixels", space="pixels", dtype="bf16")
    with (
        pytest.raises(UserError, match=r"pixels computes in fp32: leave latents\.dtype out"),
        open_latents(config, chosen, dataset),
    ):
        pass
