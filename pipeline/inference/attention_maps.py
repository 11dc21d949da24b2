"""Attention of an image's patches to the words of its prompt: the DiT's cross-attention, word by word."""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.common.errors import UserError
from model.condition import Condition
from model.dit import LIDiT

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class WordMap:
    """One word's share of the attention of each patch."""

    word: str
    shares: Tensor
    """fp32 [rows, columns] in [0, 1]: summed over the word's tokens in all LLMs, averaged over blocks and
    heads."""


@contextmanager
def recorded_attention(network: LIDiT) -> Iterator[list[Tensor]]:
    """Record each block's attention to the text in every pass of the network, averaged over heads: [B,
    patches, tokens]."""
    seen: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        # Computed a second time, because the fused attention kernels do not return their weights.
        seen.append(layer.weights(*inputs).mean(1))

    blocks: list[Any] = list(network.blocks)
    layers = [layer for block in blocks if (layer := block.text_attention()) is not None]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_to_tokens(network: LIDiT, latents: Tensor, condition: Condition) -> Tensor:
    """Run the network once and return the attention: fp32 [rows, columns, tokens], averaged over blocks and
    heads.

    Each patch's shares sum to 1.

    Args:
        network: in any precision.
        latents: noisy latents of one image, [1, C, h, w].
        condition: of the image, its texts without padding.

    Raises:
        UserError: if the network's blocks have no cross-attention to the text.
    """
    with recorded_attention(network) as seen:
        network(latents, condition)
    if not seen:
        raise UserError(
            f"model.block={network.sizes.block} has no cross-attention to show: ask for no attention maps"
        )
    grid = network.route(condition.part).sizes.patch_grid(latents.shape[2:])
    return torch.stack(seen).mean(0)[0].unflatten(0, grid).cpu()


def sum_over_words(prompt: str, spans: Sequence[Sequence[tuple[int, int]]], shares: Tensor) -> list[WordMap]:
    """Sum the shares of the tokens of each word.

    Args:
        prompt: the words.
        spans: for each LLM the range of the prompt that each of its tokens covers; empty ranges belong to no
        word.
        shares: [rows, columns, tokens], the LLMs' tokens one after another.
    """
    places = list(itertools.chain.from_iterable(spans))
    maps = []
    for match in WORD.finditer(prompt):
        # A token belongs to each word that it overlaps: tokens may contain the space before a word, or two
        # words.
        inside = torch.tensor([max(start, match.start()) < min(end, match.end()) for start, end in places])
        maps.append(WordMap(match.group(), shares[..., inside].sum(-1)))
    return maps


def overlay(image: Image.Image, shares: Tensor, side: int = 256) -> Image.Image:
    """Return the image in gray under the map as heat.

    Args:
        image: any size.
        shares: the map [rows, columns]; colors run from its smallest value to its largest.
        side: longer side of the result, in pixels.
    """
    import matplotlib  # takes a second, which only those who look at maps need

    factor = side / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    low, high = shares.min().item(), shares.max().item()
    # The bound is for a map of equal values.
    unit = ((shares - low) / max(high - low, 1e-12) * 255).byte().numpy()
    heat = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)) / 255.0  # [H, W]
    colors: Any = matplotlib.colormaps["inferno"]
    # In gray, so that the heat's colors cannot be taken for the image's.
    gray = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS))[..., None].repeat(3, axis=2)
    mixed = 0.45 * gray + 0.55 * 255 * colors(heat)[..., :3]
    return Image.fromarray(mixed.round().astype(np.uint8))
