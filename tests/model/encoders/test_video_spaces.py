"""Latent spaces of clips: sizes, causality, images as clips of one frame, statistics per channel."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

from model.common.errors import UserError
from model.encoders.latent_spaces import (
    LatentSpace,
    encodes_clips,
    latent_frames,
    latent_sizes,
    load_latent_space,
    normalize_latents,
)
from model.encoders.video_wavelet import (
    VideoWaveletAutoencoder,
    VideoWaveletConfig,
    join_bands,
    split_bands,
)

CPU = torch.device("cpu")
FOUR, FIVE = (8,) * 4, (1,) * 5
TINY = {
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "block_out_channels": FOUR,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4,
        "block_out_channels": (16, 16, 16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLWan": {"base_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": FOUR,
        "decoder_block_out_channels": FOUR,
        "layers_per_block": FIVE,
        "decoder_layers_per_block": FIVE,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
    },
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "latent_channels": 4,
        "block_out_channels": FOUR,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
}
OURS = ("VideoWaveletAutoencoder", "pixel_clips")
CAUSAL = (
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLWan",
    "AutoencoderKLLTXVideo",
    *OURS,
)


def make_space(name, folder) -> LatentSpace:
    torch.manual_seed(0)
    if name == "pixel_clips":
        return load_latent_space("", None, CPU, name)
    if name in TINY:
        getattr(diffusers, name)(**TINY[name]).save_pretrained(folder, safe_serialization=True)
    else:
        config = VideoWaveletConfig(width=16, blocks=1, channels=4)
        config = replace(config, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
        VideoWaveletAutoencoder(config).save_pretrained(folder)
    return load_latent_space(str(folder), None, CPU)


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    names = [*TINY, *OURS]
    return {name: make_space(name, tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture(scope="module")
def clip():
    return torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", [*TINY, *OURS])
def test_clips_and_images_have_the_announced_latents(spaces, clip, name):
    space = spaces[name]
    assert space.encodes_clips
    for frames in (1, 9):
        mean, std = space.encode(clip[:, :, :frames])
        sizes = latent_sizes(space.downsampling, 32, 32, frames)
        assert mean.shape == std.shape == (2, space.channels, *sizes)
        assert (std >= 0).all()
        normal = normalize_latents(mean, space.statistics)
        assert space.decode(normal).shape == (2, 3, frames, 32, 32)
        torch.testing.assert_close(space.decode(normal), space.decode_raw(mean), rtol=1e-3, atol=1e-4)
    json.dumps({**space.identity, **space.statistics})


@pytest.mark.parametrize("name", CAUSAL)
def test_later_frames_do_not_change_earlier_latents(spaces, clip, name):
    space = spaces[name]
    other = clip.clone()
    other[:, :, 5:] = -clip[:, :, 5:]
    (mean, std), (changed, changed_std) = space.encode(clip), space.encode(other)
    before = latent_frames(space.downsampling, 5)
    torch.testing.assert_close(mean[:, :, :before], changed[:, :, :before])
    torch.testing.assert_close(std[:, :, :before], changed_std[:, :, :before])
    assert not torch.allclose(mean[:, :, before:], changed[:, :, before:])
    image, _ = space.encode(clip[:, :, :1])
    torch.testing.assert_close(image, mean[:, :, :1])


def test_the_bands_of_a_clip_are_its_pixels(clip):
    torch.testing.assert_close(join_bands(split_bands(clip)), clip)
    bands = split_bands(clip)
    assert bands.shape == (2, 768, 3, 4, 4)
    weights = torch.tensor([4.0, *[1.0] * 8]).view(-1, 1, 1)
    torch.testing.assert_close(bands.square().sum(), (weights * clip.square()).sum())


def test_pixels_come_back_exactly(spaces, clip):
    space = spaces["pixel_clips"]
    mean, std = space.encode(clip)
    assert not std.any()
    torch.testing.assert_close(space.decode(normalize_latents(mean, space.statistics)), clip)


def test_tiles_are_part_of_the_identity(spaces, tmp_path):
    space = make_space("AutoencoderKLWan", tmp_path)
    assert space.identity == spaces["AutoencoderKLWan"].identity
    space.tile_encoding()
    assert space.identity == {**spaces["AutoencoderKLWan"].identity, "tiling": True}
    large = torch.zeros(1, 3, 1, 8, 288)
    assert space.encode(large)[0].shape == (1, 16, 1, 1, 36)
    with pytest.raises(UserError, match="has no tiles: leave"):
        spaces["VideoWaveletAutoencoder"].tile_encoding()


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "AutoencoderKLLTXVideo"])
def test_bf16_is_part_of_the_identity_and_close(spaces, clip, tmp_path, kind):
    space = make_space(kind, tmp_path)
    space.encode_in_bf16()
    assert space.identity == {**spaces[kind].identity, "dtype": "bf16"}
    for own, exact in zip(space.encode(clip), spaces[kind].encode(clip), strict=True):
        assert own.dtype == torch.float32
        assert 0 < (own - exact).square().mean().sqrt() < 0.02 * spaces[kind].encode(clip)[0].std()


def test_frames_divide_into_groups():
    assert [latent_frames((4, 8, 8), frames) for frames in (1, 5, 17)] == [1, 2, 5]
    with pytest.raises(UserError, match=r"16 frames: this latent space.*such as 13"):
        latent_frames((4, 8, 8), 16)
    assert encodes_clips([4, 8, 8])
    assert not encodes_clips(8)
    assert not encodes_clips([8, 16])
    assert latent_sizes((4, 8, 8), 64, 32) == (1, 8, 4)
    assert latent_sizes(8, 64, 32, frames=3) == (3, 8, 4)


def test_statistics_of_another_number_of_channels_are_refused(tmp_path):
    VideoWaveletAutoencoder(VideoWaveletConfig(width=16, blocks=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="latents_mean and latents_std need 16 numbers"):
        load_latent_space(str(tmp_path), None, CPU)
