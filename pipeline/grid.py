"""Pictures while training: the same prompts and seeds, drawn again and again with the averaged weights.

Under ZeRO-3 no rank has a network of its own, so all ranks draw together: each its share of the prompts, all with the same
number of forward passes. The LLMs read the prompts once, before the first step, and are freed.
"""

import logging
import os
from collections.abc import Mapping
from functools import partial

import torch
from PIL import Image

from pipeline.assembly import latents_family, text_families
from pipeline.config import StageConfig
from pipeline.distributed import gather
from pipeline.engine import Engine
from pipeline.pictures import make_grid, to_images
from pipeline.prompts import PromptReader, load_llm
from pipeline.sampler import decode_each, latent_shape, load_vae
from pipeline.sampling import draw
from pipeline.sources import Corpus
from pipeline.texts import TextConstants

log = logging.getLogger(__name__)


class Grid:
    """One picture of `sample.prompts`; every method is collective unless it says otherwise."""

    def __init__(self, stage: StageConfig, corpus: Corpus, constants: Mapping[str, TextConstants], engine: Engine) -> None:
        """Let the first rank's LLMs read the prompts, and load the VAE on each rank.

        Raises:
            UserError: an LLM or the VAE is gone or has changed, a prompt is too long, or the size does not divide.
        """
        self.stage = stage
        self.prompts = stage.sample.prompts
        latents = latents_family(stage, corpus)
        size = stage.sample.height, stage.sample.width
        self.shape = latent_shape(engine.module, int(latents.info["downsampling"]), *size)
        reader = PromptReader(text_families(stage, corpus), constants, partial(load_llm, device=engine.device))
        if engine.rank == 0:
            reader.read(self.prompts, keep_llms=False)
        reader.known = gather(_to_host(reader.known) if engine.rank == 0 else None)[0]
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
        self.reader = reader
        self.vae = load_vae(stage, latents, engine.device)

    def draw(self, engine: Engine) -> Image.Image | None:
        """The grid, on rank 0; None on the others."""
        share = -(-len(self.prompts) // engine.world)
        own = range(engine.rank * share, (engine.rank + 1) * share)  # beyond the end: drawn, so that all run alike, not shown
        drawn: list[Image.Image] = []
        for start in range(0, share, engine.micro_batch):
            drawn += self._draw(engine, own[start : start + engine.micro_batch])
        shown = [image for image, index in zip(drawn, own, strict=True) if index < len(self.prompts)]
        images = [image for images in gather(shown) for image in images]
        return make_grid(images, self.prompts) if engine.rank == 0 else None

    def _draw(self, engine: Engine, indices: range) -> list[Image.Image]:
        config = self.stage.sample
        prompts = [self.prompts[index % len(self.prompts)] for index in indices]
        texts, nulls = (self.reader.texts(given, engine.dtype) for given in (prompts, [""] * len(prompts)))
        seeds = [config.seed + index for index in indices]
        latents = draw(
            engine, self.stage.objective, texts, nulls, self.shape, seeds, config.steps, config.guidance,
            engine.device, engine.dtype,
        )  # fmt: skip
        return to_images(decode_each(self.vae, latents))

    def save(self, picture: Image.Image, samples: int) -> None:
        """Write the grid into the run's folder; not collective. A full disk costs the picture, not the run."""
        path = self.stage.run / "grids" / f"samples_{samples:012d}.png"
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(part, format="PNG")
            os.replace(part, path)
        except OSError as error:
            log.warning("%s was not written, the run goes on without it: %s", path, error)


def _to_host(known: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {prompt: states.cpu() for prompt, states in prompts.items()} for name, prompts in known.items()}
