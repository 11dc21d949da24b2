"""A trained run, ready to draw: the network, the LLMs that read prompts as its families were made, and the VAE."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.dit import LIDiT
from model.encoders.vae import VAE
from model.fusion import Text
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.diffusion.solvers import OnStep, draw, initial_noise, make_scheduler, set_steps
from pipeline.engine.network import build_network
from pipeline.inference.attention_maps import WordMap, attention_to_tokens, sum_over_words
from pipeline.runtime.distributed import all_reduce_min
from pipeline.stage.config import EngineConfig, ObjectiveConfig, SampleConfig, StageConfig, load_run
from pipeline.stage.corpus import latents_family, resolve
from pipeline.text.families import open_texts, text_families
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants

if TYPE_CHECKING:
    from pipeline.engine.inference import ShardedNetwork

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SamplingParams:
    """How to draw; every field changes the picture."""

    steps: int = 30
    guidance: float = 4.0
    height: int = 256
    width: int = 256
    scheduler: str = ""
    negative: str = ""
    """Prompt to steer away from; empty = the null caption of training."""
    quantised: bool = False
    """Take the LLM's states through the family's quantisation, as training saw them."""
    instruction: bool = True
    """False = leave out the prefix (system prompt and instruction) of every LLM."""
    without: tuple[str, ...] = ()
    """Text families that read the null caption instead of the prompt."""


class Sampler:
    """Draws pictures with one network; LLMs and the VAE are loaded when they are first needed.

    With a sharded network the ranks draw together: each calls `latents` for its own pictures, then `keep_pace`.
    """

    def __init__(
        self,
        network: LIDiT,
        reader: PromptReader,
        load_vae: Callable[[], VAE],
        objective: ObjectiveConfig,
        defaults: SampleConfig,
        device: torch.device,
        dtype: torch.dtype,
        sharded: "ShardedNetwork | None" = None,
    ) -> None:
        """Move the network to the device.

        Args:
            network: with its weights.
            reader: of prompts.
            load_vae: called when the first picture is decoded.
            objective: what the network was trained to predict.
            defaults: settings of sampling that hold where nothing else is asked for.
            device: where to draw.
            dtype: precision of the network.
            sharded: what keeps the network in shards, if it is; it has its device and type already.
        """
        if sharded is None:
            nn.Module.to(network, device, dtype)
        self.sharded = sharded
        self.network = network.eval().requires_grad_(False)
        self.reader = reader
        self.objective = objective
        self.defaults = defaults
        self.device = device
        self.dtype = dtype
        self._load_vae = load_vae
        self._vae: VAE | None = None

    @classmethod
    def from_run(cls, run: Path, weights: str, device: torch.device, dtype: torch.dtype, shards: bool = False) -> "Sampler":
        """Load the newest checkpoint of a run.

        Args:
            run: its folder.
            weights: `ema`, `raw`, or the decay of an average.
            device: where to draw.
            dtype: precision of the network.
            shards: shard the network over the processes.

        Raises:
            UserError: no run there, no checkpoint in it, or something that it was made with is gone or has changed.
        """
        stage, corpus = resolve(load_run(run))
        stage.runs, stage.name = str(run.absolute().parent), run.absolute().name  # where it lies now
        build, loaded = partial(build_network, stage, corpus), load_weights(run, weights)
        sharded = shard(build, loaded, dtype, stage.engine) if shards else None
        network = sharded.module if sharded else _load(run, build(), loaded)
        families, kept = text_families(stage, corpus), open_texts(stage, corpus)
        constants = {name: TextConstants.load(kept, family, device) for name, family in families.items()}
        reader = PromptReader(families, constants, partial(load_llm, device=device))
        latents = latents_family(stage, corpus)
        find_vae = partial(load_vae, stage, latents, device)
        return cls(network, reader, find_vae, stage.objective, stage.sample, device, dtype, sharded)

    @property
    def vae(self) -> VAE:
        """The VAE that made the latents."""
        if self._vae is None:
            self._vae = self._load_vae()
        return self._vae

    def check(self, drawing: SamplingParams) -> None:
        """Find what is wrong with the settings before the LLMs are loaded.

        Raises:
            UserError: a size that does not divide, an unknown scheduler, steps out of range.
        """
        self.latent_shape(drawing)
        set_steps(make_scheduler(self.objective, drawing.scheduler), drawing.steps, torch.device("cpu"))

    def latent_shape(self, drawing: SamplingParams) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture.

        Raises:
            UserError: the size does not divide.
        """
        return latent_shape(self.network, self.vae.downsampling, drawing.height, drawing.width)

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], drawing: SamplingParams, on_step: OnStep | None = None
    ) -> Tensor:
        """Draw one picture's normalised latents per prompt and seed: fp32 [B, C, h, w]."""
        missing = self._most(len(prompts)) - len(prompts)
        return self._latents([*prompts, *[""] * missing], [*seeds, *[0] * missing], drawing, on_step)[: len(prompts)]

    def keep_pace(self, drawing: SamplingParams) -> None:
        """With a sharded network: run it along with the ranks that still draw, until none does."""
        while most := self._most(0):
            self._latents([""] * most, [0] * most, drawing, None)

    def _most(self, pictures: int) -> int:
        """How many pictures this pass draws: of a sharded network as many as the rank that draws most of them."""
        return pictures if self.sharded is None else -all_reduce_min(-pictures)

    def _latents(self, prompts: Sequence[str], seeds: Sequence[int], drawing: SamplingParams, on_step: OnStep | None) -> Tensor:
        shape = self.latent_shape(drawing)
        texts, nulls = self.texts(prompts, drawing), self.texts([drawing.negative] * len(prompts), drawing)
        return draw(
            self.network, self.objective, texts, nulls, shape, seeds, drawing.steps, drawing.guidance,
            self.device, self.dtype, drawing.scheduler, on_step,
        )  # fmt: skip

    def latents_and_words(
        self, prompts: Sequence[str], seeds: Sequence[int], drawing: SamplingParams, step: int
    ) -> tuple[Tensor, list[WordMap]]:
        """`latents`, and what the first picture's patches look at in step `step` (from 1; 0 = nothing): a map per word."""
        if not step:
            return self.latents(prompts, seeds, drawing), []
        before = initial_noise(self.latent_shape(drawing), seeds[:1]).to(self.device)

        def keep(number: int, latents: Tensor) -> Tensor:
            nonlocal before
            if number == step - 1:
                before = latents[:1].clone()
            return latents

        drawn = self.latents(prompts, seeds, drawing, keep)
        _, time = set_steps(make_scheduler(self.objective, drawing.scheduler), drawing.steps, torch.device("cpu"))[step - 1]
        texts = self.texts(prompts[:1], drawing)
        shares = attention_to_tokens(self.network, before.to(self.dtype), time, texts)
        return drawn, sum_over_words(prompts[0], self.reader.spans(prompts[0], drawing.without), shares)

    def texts(self, prompts: Sequence[str], drawing: SamplingParams) -> list[Text]:
        """The prompts as the network reads them, one `Text` per LLM."""
        texts = self.reader.texts(prompts, self.dtype, drawing.quantised, drawing.without)
        if drawing.instruction:
            return texts
        return [Text(text.states[:, text.prefix :], text.mask[:, text.prefix :], 0, text.padded) for text in texts]

    def pixels(self, latents: Tensor) -> Tensor:
        """Pixels fp32 [B, 3, H, W] in [-1, 1] of normalised latents."""
        return decode_each(self.vae, latents)


def shard(
    build: Callable[[], LIDiT], weights: Mapping[str, Tensor], dtype: torch.dtype, settings: EngineConfig
) -> "ShardedNetwork":
    """A network in shards over the processes of this start (ZeRO-3).

    Raises:
        UserError: the weights are those of another network.
    """
    from pipeline.engine.inference import ShardedNetwork  # imports deepspeed, for seconds

    return ShardedNetwork(build, weights, dtype, settings)


def _load(run: Path, network: LIDiT, weights: Mapping[str, Tensor]) -> LIDiT:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{run}: its weights are those of another network than its stage.yaml describes: {error}") from error
    return network


def latent_shape(network: LIDiT, downsampling: int, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of `height` x `width` pixels.

    Raises:
        UserError: the size does not divide.
    """
    step = downsampling * network.sizes.patch
    if height < step or width < step or height % step or width % step:
        raise UserError(f"size {height}x{width}: each side has to be a multiple of {step}")
    return network.sizes.channels, height // downsampling, width // downsampling


def decode_each(vae: VAE, latents: Tensor) -> Tensor:
    """Decode latents one by one: large pictures fit into memory, and none depends on another."""
    return torch.cat([vae.decode(latent) for latent in latents.split(1)])


def load_vae(stage: StageConfig, latents: Family, device: torch.device) -> VAE:
    """The VAE that wrote a stage's latents.

    Raises:
        UserError: it is gone, or another.
    """
    source = stage.vae or str(latents.info["vae"])
    vae = VAE.load(source, None if stage.vae else latents.info["revision"], device)
    if any(latents.identity.get(key) != value for key, value in vae.identity.items()):
        raise UserError(f"VAE {source} is not the one that wrote the family `{latents.name}`: name that one by vae= in the stage")
    return vae
