"""Generating many images in batches, with a progress bar."""

from collections.abc import Iterator, Sequence

from PIL import Image
from torch import Tensor

from model.common.progress import Progress
from pipeline.inference.images import to_images
from pipeline.inference.sampler import Sampler, SamplingParams
from pipeline.runtime.console import CONSOLE


def generate_images(
    sampler: Sampler, batches: Sequence[Sequence[tuple[str, int]]], params: SamplingParams, shows: bool
) -> Iterator[list[Image.Image]]:
    """Generate batches of (prompt, seed) and yield the images of each batch.

    Exhaust the iterator: with a partitioned network, its end waits for the ranks that still generate.

    Args:
        sampler: the network.
        batches: prompts with their seeds; each batch is generated at once.
        params: sampling settings.
        shows: show a progress bar, if this is a terminal.
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
            yield to_images(sampler.pixels(latents))

        # This rank may have fewer batches than others, which still need it for their forward passes.
        sampler.keep_pace(params)
