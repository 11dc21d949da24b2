"""Pictures while training: the same prompts and seeds, drawn again and again with the averaged weights, and how well those
of scenes follow their captions.

Under ZeRO-3 no rank has a network of its own, so all ranks draw together: each its share of the prompts, all with the same
number of forward passes. The LLMs read the prompts once, before the first step, and are freed.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data_prep.scenes.captions import scene_prompts
from model.common.files import atomic_path
from pipeline.diffusion.solvers import draw
from pipeline.engine.engine import Engine
from pipeline.following.reading import read_scene
from pipeline.following.scoring import chance_level, prompt_following, score_objects
from pipeline.inference.images import make_grid, to_images
from pipeline.inference.sampler import decode_each, latent_shape, load_vae
from pipeline.runtime.distributed import gather
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.families import text_families
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants

log = logging.getLogger(__name__)

SCENES_SHOWN = 16
"""In the grid; all are scored."""


class PreviewImages(NamedTuple):
    """What was drawn, on rank 0."""

    picture: Image.Image
    """A grid of `sample.prompts` and the first scenes."""
    scores: dict[str, float]
    """`SceneScores.summary` of all scenes, `prompt_following`, and what that is by chance; empty without scenes."""


class Previews:
    """The pictures of `sample.prompts` and of held-out scenes; every method is collective unless it says otherwise."""

    def __init__(self, stage: StageConfig, corpus: Corpus, constants: Mapping[str, TextConstants], engine: Engine) -> None:
        """Let the first rank's LLMs read the prompts, and load the VAE on each rank.

        Raises:
            UserError: an LLM or the VAE is gone or has changed, a prompt is too long, or the size does not divide.
        """
        self.stage = stage
        self.scenes = [
            prompt.caption for prompt in scene_prompts(stage.sample.scenes, "list", stage.sample.width / stage.sample.height)
        ]
        self.prompts = [*stage.sample.prompts, *(caption.text for caption in self.scenes)]
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

    def draw(self, engine: Engine) -> PreviewImages | None:
        """What rank 0 gets; None on the others."""
        share = -(-len(self.prompts) // engine.world)
        own = range(engine.rank * share, (engine.rank + 1) * share)  # beyond the end: drawn, so that all run alike, not shown
        drawn: list[Image.Image] = []
        for start in range(0, share, engine.micro_batch):
            drawn += self._draw(engine, own[start : start + engine.micro_batch])
        shown = [image for image, index in zip(drawn, own, strict=True) if index < len(self.prompts)]
        images = [image for images in gather(shown) for image in images]
        if engine.rank > 0:
            return None
        first = len(self.stage.sample.prompts) + SCENES_SHOWN
        seen = [read_scene(np.asarray(image)) for image in images[len(self.prompts) - len(self.scenes) :]]
        scores, chance = score_objects(seen, self.scenes).summary(), chance_level(seen, self.scenes)
        if chance:
            scores |= {"following": prompt_following(scores), "chance": prompt_following(chance)}
        return PreviewImages(make_grid(images[:first], self.prompts[:first]), scores)

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
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                picture.save(temporary, format="PNG")
        except OSError as error:
            log.warning("%s was not written, the run goes on without it: %s", path, error)


def _to_host(known: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {prompt: states.cpu() for prompt, states in prompts.items()} for name, prompts in known.items()}
