"""Where a picture's patches look in the text: the DiT's cross-attention, word by word."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.dit import LIDiT
from model.fusion import Text

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class WordMap:
    """One word's share of the attention of each patch."""

    word: str
    shares: Tensor
    """fp32 [rows, columns] in [0, 1]: summed over the word's tokens in all LLMs, averaged over blocks and heads."""


@contextmanager
def recorded_attention(network: LIDiT) -> Iterator[list[Tensor]]:
    """Inside, each pass of the network adds each block's attention to the text, averaged over heads: [B, patches, tokens]."""
    seen: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(layer.weights(*inputs).mean(1))

    handles = [block.get_submodule("cross_attention").register_forward_pre_hook(record) for block in network.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_to_tokens(network: LIDiT, latents: Tensor, time: float, texts: Sequence[Text]) -> Tensor:
    """One pass of the network: fp32 [rows, columns, tokens], averaged over blocks and heads; each patch's shares sum to 1.

    Args:
        network: in any precision.
        latents: noisy latents of one picture, [1, C, h, w].
        time: in [0, 1].
        texts: one per LLM, of one prompt each, without padding.
    """
    with recorded_attention(network) as seen:
        network(latents, torch.full((1,), time, device=latents.device), texts)
    rows = latents.shape[2] // network.sizes.patch
    return torch.stack(seen).mean(0)[0].unflatten(0, (rows, -1)).cpu()


def sum_over_words(prompt: str, spans: Sequence[Sequence[tuple[int, int]]], shares: Tensor) -> list[WordMap]:
    """Sum the shares of the tokens of each word.

    Args:
        prompt: the words.
        spans: for each LLM where in the prompt each of its tokens stands; empty ranges belong to no word.
        shares: [rows, columns, tokens], the LLMs' tokens side by side.
    """
    places = [place for each in spans for place in each]
    maps = []
    for match in WORD.finditer(prompt):
        inside = torch.tensor([max(start, match.start()) < min(end, match.end()) for start, end in places])
        maps.append(WordMap(match.group(), shares[..., inside].sum(-1)))
    return maps


def overlay(picture: Image.Image, shares: Tensor, side: int = 256) -> Image.Image:
    """The picture in grey under the map as heat, from the map's smallest value to its largest; longer side `side`."""
    factor = side / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    low, high = shares.min().item(), shares.max().item()
    unit = ((shares - low) / max(high - low, 1e-12) * 255).byte().numpy()
    heat = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)) / 255.0  # [H, W]
    colours: Any = matplotlib.colormaps["inferno"]
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS))[..., None].repeat(3, axis=2)
    mixed = 0.45 * grey + 0.55 * 255 * colours(heat)[..., :3]
    return Image.fromarray(mixed.round().astype(np.uint8))
