"""Pixels as a latent space: nothing to train or to download, and images come back exactly as predicted.

For small images, where a patch of pixels holds no more values than the network is wide. For larger patches,
whose noise does not fit through the network, `model.predicts: clean` is what works (Li and He 2025, "Back to
Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720).
"""

import torch
from torch import Tensor

from model.encoders.latent_spaces import LatentSpace, register_latent_space

PIXELS = "pixels"


@register_latent_space(PIXELS)
class Pixels(LatentSpace):
    """RGB values in [-1, 1], of images and of clips."""

    def __init__(self, device: torch.device) -> None:
        """Remember the device that latents are put on."""
        self._device = device
        self.identity = {"space": PIXELS}
        self.channels = 3
        self.downsampling = 1
        # About those of photographs; fixed, so that all datasets share one space.
        self.statistics = {"latents_mean": 0.0, "latents_std": 0.5}

    @classmethod
    def load(cls, source: str, revision: str | None, device: torch.device) -> "Pixels":
        """Return the space; there is nothing to load, so `source` and `revision` may be empty."""
        return cls(device)

    @property
    def device(self) -> torch.device:
        """Device that latents are put on."""
        return self._device

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels [B, 3, ...] in fp32 as mean, and zeros as std."""
        mean = pixels.to(self.device, torch.float32)
        return mean, torch.zeros_like(mean)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Return latents [B, 3, ...] as pixels fp32 in [-1, 1]."""
        return latents.float().clamp(-1.0, 1.0)
