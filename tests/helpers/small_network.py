"""A small network for the engine's tests, and batches that depend only on the step.

It has everything that is easy to get wrong: two parameter groups, odd sizes that need padding, a persistent
buffer that changes in training, and a frozen parameter.
"""

import torch
from torch import nn

from pipeline.stage.config import StageConfig

GLOBAL_BATCH = 12


class Network(nn.Module):
    """Takes (latents, timesteps, texts); a forward pass leaves out the blocks in `skipped`."""

    def __init__(self, width=13, layers=3):
        super().__init__()
        self.inward = nn.Linear(5, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()) for _ in range(layers)
        )
        self.gate = nn.Linear(1, width)
        self.outward = nn.Linear(width, 5)
        self.skipped = ()
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("derived", torch.linspace(0, 1, 5), persistent=False)

    def forward(self, latents, timesteps, texts):
        if torch.is_grad_enabled():
            self.seen += 1
        x = self.inward(latents + self.derived.to(latents.dtype)) + self.frozen
        gate = self.gate(timesteps[:, None].to(x.dtype))
        for index, block in enumerate(self.blocks):
            if index not in self.skipped:
                x = x + gate * block(x)
        return self.outward(x) + sum(texts)


def stage(optimizer="adamw", **engine):
    """A stage for the network; keywords are engine settings."""
    config = StageConfig(name="small", global_batch=GLOBAL_BATCH, samples=10_000, ema=[0.9, 0.99])
    config.optim.weight_decay = 0.1
    config.optim.clip = 0.5
    config.optim.name = optimizer
    settings = {
        "precision": "fp32",
        "reduce_bucket": 1000,
        "persistence_threshold": 20,
        "overlap_comm": False,
        **engine,
    }
    for name, value in settings.items():
        setattr(config.engine, name, value)
    return config


def batch(step, part=slice(None)):
    """Return (latents, timesteps, texts) and target of the samples `part` of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    latents, target = torch.randn(2, GLOBAL_BATCH, 5, generator=generator)
    timesteps = torch.rand(GLOBAL_BATCH, generator=generator)
    text = torch.randn(GLOBAL_BATCH, 5, generator=generator)
    return (latents[part], timesteps[part], [0.1 * text[part]]), target[part]
