"""Small networks with random weights, and random texts for them.

Weights are drawn anew since a fresh network has its gates at zero and would hide almost every property; tests
run in fp64, so that what must be equal is equal far below any real difference.
"""

from dataclasses import replace

import torch
from hypothesis import settings

from model.condition import Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT

SMALL = DiTConfig(depth=2, width=32, heads=2, patch=2, channels=4, frequency_width=16)

few = settings(max_examples=10, deadline=None, derandomize=True, database=None)

SWITCHES = {
    "llama": (FusionConfig(mode="none", refiner="none"), 1),
    "llama_refiner": (FusionConfig(mode="none"), 1),
    "llama_refiner_causal": (FusionConfig(mode="none", refiner="causal"), 1),
    "llama_refiner_1_block": (FusionConfig(mode="none", refiner_blocks=1), 1),
    "llama_refiner_3_blocks": (FusionConfig(mode="none", refiner_blocks=3), 1),
    "llama_refiner_no_gate": (FusionConfig(mode="none", gate=False), 1),
    "concat_one": (FusionConfig(mode="concat"), 1),
    "concat_two": (FusionConfig(mode="concat"), 2),
    "concat_two_no_refiner": (FusionConfig(mode="concat", refiner="none"), 2),
    "collaborative_one": (FusionConfig(), 1),
    "collaborative_two": (FusionConfig(), 2),
    "collaborative_three": (FusionConfig(), 3),
    "collaborative_two_blocks": (FusionConfig(collaborative_blocks=2), 2),
    "collaborative_alone": (FusionConfig(refiner="none"), 2),
    "crop_before": (FusionConfig(crop="before"), 2),
    "pool_all": (FusionConfig(pool="all"), 2),
    "without_pooled_text": (FusionConfig(pool="none"), 2),
    "without_pooled_text_narrow": (FusionConfig(pool="none", width=16, heads=4), 1),
    "without_time": (FusionConfig(time=False), 2),
    "narrow": (FusionConfig(width=16, heads=4), 2),
}
"""Settings of every row of the paper's tables 2, 3, 5 and 6, and of our own switches, with the number of
LLMs."""

WIDTHS = (12, 20, 8)


def randomise(module, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator)
    return module.double().eval()


def random_network(fusion=None, llms=2, seed=0, checkpoint_every=0, **sizes):
    network = LIDiT(replace(SMALL, **sizes), fusion or FusionConfig(), WIDTHS[:llms], checkpoint_every)
    return randomise(network, seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_text(width, lengths, prefix=3, padding=0, fill=0.0, seed=0):
    """Captions of `lengths` tokens after one prefix, padded by at least `padding` tokens that hold `fill`."""
    longest = prefix + max(lengths) + padding
    states = torch.full((len(lengths), longest, width), fill, dtype=torch.float64)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    states[:, :prefix] = normal(prefix, width, seed=seed)
    for row, length in enumerate(lengths):
        states[row, prefix : prefix + length] = normal(length, width, seed=1000 * seed + row + 1)
        mask[row, : prefix + length] = True
    return Text(states, mask, prefix)


def random_inputs(llms=2, lengths=(4, 2), height=4, width=6, padding=0, fill=0.0, seed=0):
    batch = len(lengths)
    texts = [
        random_text(WIDTHS[i], lengths, prefix=i + 2, padding=padding, fill=fill, seed=seed + i)
        for i in range(llms)
    ]
    timesteps = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    return normal(batch, SMALL.channels, height, width, seed=seed), timesteps, texts


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)
