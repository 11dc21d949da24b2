"""Pixels of clips as a latent space: nothing to train, and clips come back exactly as predicted.

A position holds 4 frames of 8 x 8 pixels, transformed as in `model/encoders/video_wavelet.py`. The transform
is orthonormal, so noise on the latents is noise on the pixels. For tiny clips, with `model.predicts: clean`:
768 values of noise do not fit through a narrow network (`pixels.py`).
"""

import torch
from torch import Tensor

from model.encoders.latent_spaces import LatentSpace, register_latent_space
from model.encoders.video_wavelet import BANDS, GROUP, SIDE, join_bands, split_bands

PIXEL_CLIPS = "pixel_clips"


@register_latent_space(PIXEL_CLIPS)
class PixelClips(LatentSpace):
    """RGB values in [-1, 1] of groups of frames; the first frame is a group by itself."""

    def __init__(self, device: torch.device) -> None:
        """Remember the device that latents are put on."""
        self._device = device
        self.identity = {"space": PIXEL_CLIPS}
        self.channels = GROUP * BANDS
        self.downsampling = (GROUP, SIDE, SIDE)
        # Those of pixels, one std for all bands, so that noise hides all of them alike.
        self.statistics = {"latents_mean": 0.0, "latents_std": 0.5}

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "PixelClips":
        """Return the space; there is nothing to load, so `source` and `revision` may be empty."""
        return cls(device)

    @property
    def device(self) -> torch.device:
        """Device that latents are put on."""
        return self._device

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bands [B, 768, t, h, w] of pixels [B, 3, T, H, W] as mean, and zeros as std."""
        mean = split_bands(pixels.to(self.device, torch.float32))
        return mean, torch.zeros_like(mean)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Return bands [B, 768, t, h, w] as pixels fp32 [B, 3, T, H, W] in [-1, 1]."""
        return join_bands(latents.float()).clamp(-1.0, 1.0)
