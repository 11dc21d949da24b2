"""A latent space from outside the package, without weights: blocks of 8x8 pixels, folded into channels."""

import torch
from einops import rearrange

from model.encoders.latent_spaces import LatentSpace, register_latent_space

BLOCK = 8
CHANNELS = 3 * BLOCK * BLOCK
MEAN = tuple(0.3 - channel / CHANNELS for channel in range(CHANNELS))
STD = tuple(0.4 + channel / CHANNELS for channel in range(CHANNELS))


@register_latent_space("toy_pixels")
class PixelSpace(LatentSpace):
    """The pixels themselves, with a mean and std per channel."""

    def __init__(self, device):
        self._device = device
        self.channels = CHANNELS
        self.downsampling = (BLOCK, BLOCK)
        self.statistics = {"latents_mean": MEAN, "latents_std": STD}
        self.identity = {"block": BLOCK}

    @classmethod
    def load(cls, source, revision, device):
        return cls(device)

    @property
    def device(self):
        return self._device

    def encode(self, pixels):
        blocks = rearrange(pixels.to(self.device), "b c (h y) (w x) -> b (c y x) h w", y=BLOCK, x=BLOCK)
        return blocks, torch.zeros_like(blocks)

    def decode_raw(self, latents):
        pixels = rearrange(latents, "b (c y x) h w -> b c (h y) (w x)", y=BLOCK, x=BLOCK, c=3)
        return pixels.clamp(-1.0, 1.0)


def train(stage, overrides):
    """Train a stage on this rank, in a process that knows the space; returns the exit code."""
    # imported here, so that tests of data preparation need not load DeepSpeed
    from pipeline.runtime.distributed import Distributed
    from pipeline.runtime.stopping import Stop
    from pipeline.stage.config import load_stage
    from pipeline.training.trainer import Trainer

    return Trainer(load_stage(stage, overrides), Distributed.from_environment(), Stop()).run()
