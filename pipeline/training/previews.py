"""Images during training: the same prompts and seeds, sampled repeatedly with the averaged weights, and how
well those of scenes follow their captions.

Under ZeRO-3 no rank has a whole network, so all ranks sample together: each its share of the prompts, all
with the same number of forward passes. The LLMs read the prompts once, before the first step, and are freed.
"""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.common.files import atomic_path, write_atomic
from model.condition import Condition
from model.sub_network import Part
from pipeline.diffusion.adaptive import ADAPTIVE
from pipeline.diffusion.solvers import make_scheduler, sample_latents
from pipeline.engine.engine import Engine
from pipeline.inference.elastic import Parts, sizes_for_solver
from pipeline.inference.sampler import (
    SamplingParams,
    decode_each,
    extra_conditions,
    load_vae,
    sample_latent_shape,
)
from pipeline.runtime.distributed import gather
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.families import text_families
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants
from pipeline.training.callbacks import Callback
from pipeline.training.preview_kinds import preview_kind

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer

log = logging.getLogger(__name__)

SCENES_SHOWN = 16
"""Scenes in the grid; all are scored."""


class PreviewImages(NamedTuple):
    """The result on rank 0."""

    grid: Image.Image
    """A grid of `sample.prompts` and the first scenes."""
    scores: dict[str, float]
    """`SceneScores.summary` of all scenes, `prompt_following`, and its chance level; empty without scenes."""
    moving: bytes | None = None
    """The grid of clips as an animated WebP; `grid` then shows some frames of each."""


class Previews(Callback):
    """Samples images or clips of `sample.prompts` and of held-out scenes; every method is collective unless
    it says otherwise."""

    def __init__(
        self, stage: StageConfig, corpus: Corpus, constants: Mapping[str, TextConstants], engine: Engine
    ) -> None:
        """Let the first rank's LLMs read the prompts, and load the latent space on each rank.

        Args:
            stage: the resolved stage.
            corpus: its datasets.
            constants: what all captions of each text family share.
            engine: the network that samples.

        Raises:
            UserError: if an LLM or the latent space is missing or has changed, a prompt is too long, the size
                does not divide, or the scheduler does not fit.
        """
        self.stage = stage
        sample = stage.sample
        self.kind = preview_kind(sample)
        self.prompts = [*sample.prompts, *(caption.text for caption in self.kind.captions)]
        self.parts: list[Part | None] = [None]
        """Parts of the network that sample, one after another."""
        if stage.elastic.elastic:
            self.parts = [*stage.elastic.choices(engine.module.sizes)]

        latents = latents_family(stage, corpus)
        patch = max([engine.module.sizes.patch, *stage.elastic.patches])
        downsampling = latents.info["downsampling"]
        size = sample.height, sample.width, sample.frames
        self.shape = sample_latent_shape(engine.module, downsampling, *size, patch)
        self._solver(engine)  # refuses one that does not fit before the LLMs are loaded

        reader = PromptReader(
            text_families(stage, corpus, sample.frames > 1),
            constants,
            partial(load_llm, device=engine.device),
        )
        # One rank reads for all, so that the other ranks need no memory for the LLMs.
        if engine.rank == 0:
            reader.read(self.prompts, keep_llms=False)
        # Over host memory, since the device of rank 0 does not exist on other ranks.
        reader.known = gather(_to_host(reader.known) if engine.rank == 0 else None)[0]
        if engine.device.type == "cuda":
            # Otherwise the memory of the freed LLMs stays cut into blocks of their sizes in torch's cache.
            torch.cuda.empty_cache()

        self.reader = reader
        self.vae = load_vae(stage, latents, engine.device)

    def between_steps(self, trainer: "Trainer") -> None:
        """Sample, save and log the images every `sample.every_samples` samples."""
        if not trainer.due(self.stage.sample.every_samples):
            return
        state = trainer.state
        trainer.heartbeat.enter("draw", state.step)
        began = time.monotonic()

        for number, part in enumerate(self.parts):
            # Those of the default part have the names that they have of a plain network.
            name = str(part) if number else ""
            suffix = f"_{name}" if name else ""
            with trainer.engine.averaged():
                images = self.sample(trainer.engine, part)
            # Only rank 0 has the images and writes; the others go on to the next collective.
            if images is not None:
                self.save(images, state.samples, name)
                trainer.log.image(f"samples{suffix}", np.asarray(images.grid), state.samples)
                trainer.log.scores(f"scenes{suffix}", state.step, state.samples, images.scores)
        trainer.log_event("grid", seconds=time.monotonic() - began)

    def sample(self, engine: Engine, part: Part | None = None) -> PreviewImages | None:
        """Sample all images with a part of the network, None = the whole; rank 0 gets them, the others
        None."""
        share = -(-len(self.prompts) // engine.world)
        # indices beyond the end are sampled, so that all ranks run equally often, but not shown
        indices = range(engine.rank * share, (engine.rank + 1) * share)
        sampled: list[Any] = []
        # At most a micro-batch at a time: that many samples are known to fit into memory.
        for start in range(0, share, engine.micro_batch):
            sampled += self._sample(engine, indices[start : start + engine.micro_batch], part)

        # The stage's prompts come before the scenes, as in `self.prompts`.
        scenes = range(len(self.stage.sample.prompts), len(self.prompts))
        own = [image for image, index in zip(sampled, indices, strict=True) if index < len(self.prompts)]
        # Each rank reads its own scenes: reading all of them would take the first one as long as sampling.
        own_found = [
            self.kind.read(image) for image, index in zip(sampled, indices, strict=True) if index in scenes
        ]
        images = list(itertools.chain.from_iterable(gather(own)))
        found = list(itertools.chain.from_iterable(gather(own_found)))
        if engine.rank > 0:
            return None

        first = scenes.start + SCENES_SHOWN
        shown, prompts = images[:first], self.prompts[:first]
        grids = self.kind.make_grid(shown, prompts), self.kind.make_moving_grid(shown, prompts)
        return PreviewImages(grids[0], self.kind.scores(found), grids[1])

    def _sample(self, engine: Engine, indices: range, part: Part | None) -> list[Any]:
        sample = self.stage.sample
        # Any prompt does for the indices beyond the end.
        prompts = [self.prompts[index % len(self.prompts)] for index in indices]
        # By index and not by rank: another number of processes samples the same images,
        # on a CPU too only up to rounding, since a batch is computed at once.
        seeds = [sample.seed + index for index in indices]
        latents = sample_latents(
            engine,
            self._solver(engine, part),
            replace(self._condition(engine, prompts), part=part),
            replace(self._condition(engine, [""] * len(prompts)), part=part),
            self.shape,
            seeds,
            sample.steps,
            sample.guidance,
            engine.dtype,
            together=True,
        )
        return self.kind.convert(decode_each(self.vae, latents))

    def _solver(self, engine: Engine, part: Part | None = None) -> Any:
        sample, objective = self.stage.sample, self.stage.objective
        sizes = sizes_for_solver(engine.module, Parts(part, part), sample.scheduler in ADAPTIVE)
        if objective.shift_positions is not None:
            objective = objective.at_size(math.prod(self.shape[1:]))
        return make_scheduler(objective, sample.scheduler, sample.adaptive, sizes)

    def _condition(self, engine: Engine, prompts: list[str]) -> Condition:
        params = SamplingParams(height=self.stage.sample.height, width=self.stage.sample.width)
        extra = extra_conditions(engine.module, params, len(prompts), engine.device)
        # Replaced at each step of the solver.
        timesteps = torch.zeros(len(prompts), device=engine.device)
        return Condition(timesteps, self.reader.texts(prompts, engine.dtype), extra)

    def save(self, images: PreviewImages, samples: int, name: str = "") -> None:
        """Write the grid into the run's folder, in that of its part; not collective. A full disk costs
        the image, not the run."""
        path = self.stage.run / "grids" / name / f"samples_{samples:012d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                images.grid.save(temporary, format="PNG")
            if images.moving is not None:
                write_atomic(path.with_suffix(".webp"), images.moving)
        except OSError as error:
            log.warning("%s was not written, the run goes on without it: %s", path, error)


def _to_host(known: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return the prompts' hidden states, by family and prompt, in host memory."""
    moved: dict[str, dict[str, Tensor]] = {}
    for family, prompts in known.items():
        moved[family] = {prompt: states.cpu() for prompt, states in prompts.items()}
    return moved
