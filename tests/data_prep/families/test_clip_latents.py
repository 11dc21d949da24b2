"""Latents families of clips and images in one latent space."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.clips.media import encode_clip
from data_prep.config import LatentsConfig
from data_prep.dataset.parts import commit_part, register_family
from data_prep.dataset.schema import LATENT_COLUMNS, MEAN_ALONE, MEAN_COLUMNS, Family, Manifest, Part
from data_prep.families.latents import decode_clips, encode_pairs, latents_family, means_alone
from data_prep.families.latents_report import missing_noise, print_missing_noise
from data_prep.pairs.pairs import Pair
from data_prep.store.store import open_store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.encoders.vae import VAE, small_vae
from model.encoders.video_wavelet import VideoWaveletAutoencoder, VideoWaveletConfig, VideoWaveletSpace

CHANNELS = 4


@pytest.fixture(scope="module")
def space():
    torch.manual_seed(0)
    config = VideoWaveletConfig(16, 1, CHANNELS, [0.0] * CHANNELS, [0.5] * CHANNELS)
    return VideoWaveletSpace(VideoWaveletAutoencoder(config).eval().requires_grad_(False), "0" * 64)


def make_pairs(count, frames):
    """Pairs of random clips of 16 x 24 pixels, or of images."""
    pairs = []
    for number in range(count):
        clip = np.random.default_rng(number).integers(0, 255, (frames, 16, 24, 3), np.uint8)
        pairs.append(Pair(number, f"key{number}", encode_clip(clip, 8.0, "webp"), [], 16, 24, frames, 8.0))
    return pairs


def encode(space, pairs):
    with Workers(decode_clips, None, lambda _: pytest.fail("lost"), 0) as decoders:
        return encode_pairs(space, pairs, 2, decoders)


def unpack(data, *shape):
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(shape).float()


@pytest.mark.parametrize("frames", [1, 9])
def test_rows_are_the_latents_of_each_clip(space, frames):
    pairs = make_pairs(3, frames)
    rows, counts = encode(space, pairs)
    latents = 1 + (frames - 1) // 4
    pixels = torch.from_numpy(np.stack(decode_clips(None, pairs))).movedim(-1, 1).float() / 127.5 - 1
    for moment, encoded in zip(("mean", "std"), space.encode(pixels), strict=True):
        stored = torch.stack([unpack(row[moment], CHANNELS, latents, 2, 3) for row in rows])
        torch.testing.assert_close(stored, encoded, atol=1e-2, rtol=1e-2)
    assert counts.keys() == {"latent_mean", "latent_std"}


def test_means_alone_are_half_the_bytes_and_say_what_is_missing(space):
    rows, counts = encode(space, make_pairs(3, 5))
    means, stds = (torch.stack([unpack(row[name], -1) for row in rows]).double() for name in ("mean", "std"))
    kept, more = means_alone([dict(row) for row in rows], counts)
    assert all(row.keys() == MEAN_COLUMNS.keys() for row in kept)
    assert [row["mean"] for row in kept] == [row["mean"] for row in rows]
    expected = stds.square().mean().sqrt() / means.std(correction=0)
    assert more["posterior_std"] == pytest.approx(expected.item())
    assert {**more, "posterior_std": 0} == {**counts, "posterior_std": 0}


def test_the_noise_that_means_alone_lack_is_stated(tmp_path, capsys):
    dataset, file = open_store(str(tmp_path), create=True).sub("set"), tmp_path / "file"
    file.write_bytes(b"")
    dataset.put_new(Manifest.KEY, Manifest("set", ["original"], {"16x16": [3, 1]}).to_json())
    for name, identity in (("means", {"moments": MEAN_ALONE}), ("whole", {})):
        family = register_family(dataset, Family(name, "latents", identity, {"channels": 4}), None)
        for number, (rows, noise) in enumerate(((3, 0.1), (1, 0.3))):
            ids = list(range(10 * number, 10 * number + rows))
            counts = {"posterior_std": noise} if name == "means" else {}
            commit_part(dataset, name, Part("16x16", number), {"a.mds": file}, ids, counts, family.hash)
    assert missing_noise(dataset) == {"means": pytest.approx(((3 * 0.01 + 0.09) / 4) ** 0.5)}
    for name in ("whole", "means"):
        print_missing_noise(dataset, name)
    assert capsys.readouterr().out.count("17.32% of the latents' std") == 1


def test_the_family_says_how_it_was_made(space):
    whole, mean = (
        latents_family(LatentsConfig("latents", "runs/vae", moments=moments), space)
        for moments in ("mean_std", "mean")
    )
    assert whole.info["downsampling"] == [4, 8, 8]
    assert whole.identity["space"] == "VideoWaveletAutoencoder"
    assert whole.hash != mean.hash
    assert whole.columns == LATENT_COLUMNS
    assert Family.from_json(mean.to_json()).columns == MEAN_COLUMNS


def test_what_a_space_cannot_encode_is_one_line(space):
    with pytest.raises(UserError, match=r"bucket 16x24x5: the space AutoencoderKL encodes images alone"):
        encode(VAE(small_vae(), ""), make_pairs(1, 5))
    with pytest.raises(UserError, match="6 frames: this latent space encodes a first frame and groups of 4"):
        encode(space, make_pairs(1, 6))
    with pytest.raises(ValueError, match="in a bucket of"):
        encode(space, [replace(make_pairs(1, 5)[0], height=32)])
