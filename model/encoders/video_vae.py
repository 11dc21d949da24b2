"""Frozen video VAEs of diffusers, read from safetensors only; each is registered by its class's name.

Latents of a clip of T frames have 1 + (T - 1) / r frames, where r is the downsampling in time, so an image is
a clip of one frame. Wan's, LTX's and HunyuanVideo 1.5's are causal exactly: later frames do not change
earlier latents. HunyuanVideo's and CogVideoX's have norms over all frames, which let a little through.
"""

import hashlib
import math
from abc import abstractmethod
from typing import Any

import diffusers
import torch
from torch import Tensor

from model.common.records import canonical_json
from model.encoders.latent_spaces import LatentSpace, Statistics, find_folder, register_latent_space
from model.encoders.vae import load_module, to_bf16

TILED_POSITIONS = 17 * 512 * 512
"""Frames x height x width above which clips are decoded in tiles, which takes less memory."""


class VideoVAE(LatentSpace):
    """The latent space of a video VAE of diffusers: what all of them have in common."""

    def __init__(self, module: Any, weights_sha256: str) -> None:
        """Wrap a diffusers autoencoder of clips.

        Args:
            module: the autoencoder.
            weights_sha256: hash of its file of weights, for its identity.
        """
        self.module = module
        self.channels, self.downsampling = self.describe(module)
        self.statistics = self.statistics_of(module)

        config = {key: value for key, value in module.config.items() if not key.startswith("_")}
        self.identity = {
            "vae": type(module).__name__,
            "weights_sha256": weights_sha256,
            # Which of the many fields decide the encoder's numbers differs from class to class.
            "config_sha256": hashlib.sha256(canonical_json(config)).hexdigest(),
        }
        # By default HunyuanVideo's module cuts clips of more than 16 frames into stretches that it blends.
        self._tile(False)

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "VideoVAE":
        """Load the VAE of a local folder or of the hub, in fp32; arguments as in `LatentSpace.load`.

        Raises:
            UserError: if there is no such VAE or no safetensors file, or the weights do not fit the config.
        """
        folder = find_folder(source, revision)
        return cls(*load_module(getattr(diffusers, cls.name), folder, device))

    @staticmethod
    @abstractmethod
    def describe(module: Any) -> tuple[int, tuple[int, int, int]]:
        """Return the module's latent channels, and its downsampling in time, height and width."""

    @staticmethod
    def statistics_of(module: Any) -> Statistics:
        """Return mean and std of the module's raw latents."""
        config = module.config
        return {
            "scaling_factor": config["scaling_factor"],
            "shift_factor": config.get("shift_factor") or 0.0,
        }

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return self.module.device

    def tile_encoding(self) -> None:
        """Encode large clips in overlapping tiles from now on; the identity then says so."""
        self.identity = {**self.identity, "tiling": True}

    def encode_in_bf16(self) -> None:
        """Compute in bf16 from now on; the identity then says so."""
        to_bf16(self.module)
        self.identity = {**self.identity, "dtype": "bf16"}

    def _tile(self, on: bool) -> None:
        """Set whether the module works in tiles."""
        if on:
            self.module.enable_tiling()
        else:
            self.module.use_tiling = False
        for name in ("use_framewise_encoding", "use_framewise_decoding"):
            if hasattr(self.module, name):
                setattr(self.module, name, on)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the posterior, each fp32 [B, C, t, h, w], of pixels [B, 3, T, H, W] in
        [-1, 1]."""
        self._tile("tiling" in self.identity)
        posterior = self.module.encode(pixels.to(self.device, self.module.dtype), return_dict=False)[0]
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode raw latents [B, C, t, h, w], on the VAE's device, to pixels fp32 [B, 3, T, H, W] in
        [-1, 1]."""
        assert isinstance(self.downsampling, tuple)
        positions = math.prod(latents.shape[2:]) * math.prod(self.downsampling)
        self._tile(positions > TILED_POSITIONS)
        pixels = self.module.decode(latents.to(self.module.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1.0, 1.0)


@register_latent_space("AutoencoderKLHunyuanVideo")
class HunyuanVideoVAE(VideoVAE):
    """The VAE of HunyuanVideo: 4 x 8 x 8, 16 channels."""

    @staticmethod
    def describe(module: Any) -> tuple[int, tuple[int, int, int]]:
        """Return channels and downsampling."""
        config = module.config
        side = config["spatial_compression_ratio"]
        return config["latent_channels"], (config["temporal_compression_ratio"], side, side)


@register_latent_space("AutoencoderKLHunyuanVideo15")
class HunyuanVideo15VAE(HunyuanVideoVAE):
    """The VAE of HunyuanVideo 1.5: 4 x 16 x 16, 32 channels."""

    def __init__(self, module: Any, weights_sha256: str) -> None:
        super().__init__(module, weights_sha256)
        # The mask of its attention in diffusers 0.39 has a shape that fits one sample alone.
        module.use_slicing = True


@register_latent_space("AutoencoderKLWan")
class WanVAE(VideoVAE):
    """The VAEs of Wan 2.1 (4 x 8 x 8, 16 channels) and 2.2 (4 x 16 x 16, 48 channels), with statistics per
    channel."""

    @staticmethod
    def describe(module: Any) -> tuple[int, tuple[int, int, int]]:
        """Return channels and downsampling."""
        config = module.config
        side = config["scale_factor_spatial"]
        return config["z_dim"], (config["scale_factor_temporal"], side, side)

    @staticmethod
    def statistics_of(module: Any) -> Statistics:
        """Return mean and std per channel."""
        return {key: list(module.config[key]) for key in ("latents_mean", "latents_std")}


@register_latent_space("AutoencoderKLLTXVideo")
class LTXVideoVAE(VideoVAE):
    """The VAE of LTX-Video: 8 x 32 x 32, 128 channels, with statistics per channel among its weights."""

    @staticmethod
    def describe(module: Any) -> tuple[int, tuple[int, int, int]]:
        """Return channels and downsampling."""
        side = module.spatial_compression_ratio
        return module.config["latent_channels"], (module.temporal_compression_ratio, side, side)

    @staticmethod
    def statistics_of(module: Any) -> Statistics:
        """Return mean and std per channel."""
        factor = module.config["scaling_factor"]
        return {
            "latents_mean": module.latents_mean.tolist(),
            "latents_std": (module.latents_std / factor).tolist(),
        }


@register_latent_space("AutoencoderKLCogVideoX")
class CogVideoXVAE(VideoVAE):
    """The VAE of CogVideoX: 4 x 8 x 8, 16 channels."""

    @staticmethod
    def describe(module: Any) -> tuple[int, tuple[int, int, int]]:
        """Return channels and downsampling."""
        config = module.config
        # Every block of the encoder but the last halves the sides.
        side = 2 ** (len(config["block_out_channels"]) - 1)
        return config["latent_channels"], (int(config["temporal_compression_ratio"]), side, side)
