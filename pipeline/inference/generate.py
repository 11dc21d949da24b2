"""Generating many images or clips in batches, with a progress bar."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from model.common.progress import Progress
from pipeline.inference.images import to_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.console import CONSOLE


def generate_images(
    sampler: Sampler, batches: Sequence[Sequence[tuple[str, int]]], params: SamplingParams, shows: bool
) -> Iterator[list[Image.Image]]:
    """Generate batches of (prompt, seed) and yield the images of each batch, as `generate` does."""
    return generate(sampler, batches, params, shows, to_images)


def generate(
    sampler: Sampler,
    batches: Sequence[Sequence[tuple[str, int]]],
    params: SamplingParams,
    shows: bool,
    convert: Callable[[Tensor], list[Any]],
) -> Iterator[list[Any]]:
    """Generate batches of (prompt, seed) and yield what `convert` makes of the pixels of each batch.

    Exhaust the iterator: with a partitioned network, its end waits for the ranks that still generate.

    Args:
        sampler: the network.
        batches: prompts with their seeds; each batch is generated at once.
        params: sampling settings.
        shows: show a progress bar, if this is a terminal.
        convert: `to_images` or `to_clips`.
    """
    steps = sum(map(len, batches)) * params.steps
    with Progress("generating", steps, "steps", console=CONSOLE, shows=shows, lines=False) as progress:
        for batch in batches:
            # A default argument, since the function would otherwise see the size of a later batch.
            def count_step(_: int, latents: Tensor, images: int = len(batch)) -> Tensor:
                progress.advance(images)
                return latents

            prompts = [prompt for prompt, _ in batch]
            seeds = [seed for _, seed in batch]
            latents = sampler.latents(prompts, seeds, params, count_step)
            yield convert(sampler.pixels(latents))

        # This rank may have fewer batches than others, which still need it for their forward passes.
        sampler.keep_pace(params)
