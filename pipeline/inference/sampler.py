"""A trained run, ready to sample: the network, the LLMs that read prompts as its families were made, and the
latent space."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.dataset.schema import Family
from data_prep.dataset.users import find_user, read_names
from model.common.errors import UserError
from model.condition import Condition, Text
from model.conditions import CONDITIONS
from model.dit import LIDiT
from model.encoders.latent_spaces import (
    AUTOENCODER_KL,
    CONFIG,
    LatentSpace,
    encodes_clips,
    latent_sizes,
    load_latent_space,
    same_latents,
    side_downsampling,
)
from model.fusion import attended
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.diffusion.adaptive import ADAPTIVE
from pipeline.diffusion.first_frame import GivenFirstFrame
from pipeline.diffusion.guidance import has_own_scale
from pipeline.diffusion.solvers import (
    OnStep,
    count_evaluations,
    initial_noise,
    make_scheduler,
    sample_latents,
    scheduler_names,
    set_steps,
)
from pipeline.engine.network import build_network
from pipeline.inference.attention_maps import WordMap, attention_to_tokens, sum_over_words
from pipeline.inference.clips import read_first_frame
from pipeline.inference.elastic import ChosenParts, Parts, choose_parts, largest_patch, sizes_for_solver
from pipeline.inference.users import UserFinder
from pipeline.runtime.distributed import all_reduce_min
from pipeline.stage.config import EngineConfig, StageConfig
from pipeline.stage.corpus import latents_family, resolve_run
from pipeline.stage.objective import ObjectiveConfig
from pipeline.stage.sampling import AdaptiveConfig, SamplingConfig
from pipeline.text.families import open_reader
from pipeline.text.prompts import PromptReader

if TYPE_CHECKING:
    from pipeline.engine.inference import PartitionedNetwork


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling; every field changes the image."""

    steps: int = 30
    guidance: float = 4.0
    height: int = 256
    width: int = 256
    scheduler: str = ""
    negative: str = ""
    """Prompt to steer away from; empty = the null caption of training."""
    quantised: bool = False
    """Take the LLM's hidden states through the family's quantization, as training saw them."""
    instruction: bool = True
    """False = leave out the prefix (system prompt and instruction) of every LLM."""
    without: tuple[str, ...] = ()
    """Text families that read the null caption instead of the prompt."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Values of the network's further conditions (`model.conditions`), by name; the others take their
    default."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Settings of the schedulers that follow the difficulty of patches."""
    parts: ChosenParts = field(default_factory=ChosenParts)
    """Depth and size of patches of an elastic network."""
    user: str = ""
    """Name, number or file of a user; empty = nobody."""
    user_guidance: float | None = None
    """Scale of the user by itself; None = that of the text."""
    frames: int = 1
    """Frames of a clip; 1 = an image."""
    first_frame: str = ""
    """File of an image that the clip begins with; empty = none."""
    together: bool = False
    """The network takes a batch at once on the CPU too: faster for images of few patches, which then depend
    on their batch by rounding errors."""

    def record(self) -> dict[str, Any]:
        """Return the settings as they are written next to an image; `conditions`, `adaptive`, `frames` and
        those of the user only if they are read, depth and size of patches and `together` only if they are
        asked for."""
        record = asdict(self)
        record |= self.parts.record()
        del record["parts"]
        if self.scheduler not in ADAPTIVE:
            del record["adaptive"]
        if not self.conditions:
            # Networks without conditions keep the records that they always had.
            del record["conditions"]
        if not self.user:
            del record["user"], record["user_guidance"]
        for name, unset in (("frames", 1), ("first_frame", ""), ("together", False)):
            if record[name] == unset:
                del record[name]
        return record


class Sampler:
    """Generates images with one network; LLMs and the latent space are loaded when they are first needed.

    With a partitioned network the ranks sample together: each calls `latents` for its own images, then
    `keep_pace`.
    """

    def __init__(
        self,
        network: LIDiT,
        reader: PromptReader,
        load_vae: Callable[[], LatentSpace],
        objective: ObjectiveConfig,
        defaults: SamplingConfig,
        device: torch.device,
        dtype: torch.dtype,
        partitioned: "PartitionedNetwork | None" = None,
    ) -> None:
        """Move the network to the device.

        Args:
            network: with its weights.
            reader: of prompts.
            load_vae: called when the first image is decoded.
            objective: what the network was trained to predict.
            defaults: settings of sampling that apply if nothing else is asked for.
            device: device to sample on.
            dtype: precision of the network.
            partitioned: what keeps the network partitioned, if it is; it has its device and dtype already.
        """
        if partitioned is None:
            nn.Module.to(network, device, dtype)
        self.partitioned = partitioned
        # Without gradients, since no activation is then kept for a backward pass.
        self.network = network.eval().requires_grad_(False)
        self.reader = reader
        self.objective = objective
        self.defaults = defaults
        self.device = device
        self.dtype = dtype
        self.users = UserFinder(network)
        self._load_vae = load_vae
        self._vae: LatentSpace | None = None

    @classmethod
    def from_run(
        cls, run: Path, weights: str, device: torch.device, dtype: torch.dtype, zero3: bool = False
    ) -> "Sampler":
        """Load the newest checkpoint of a run.

        Args:
            run: its folder.
            weights: `ema`, `raw`, or the decay of an average.
            device: device to sample on.
            dtype: precision of the network.
            zero3: partition the network over the processes.

        Raises:
            UserError: if there is no run or no checkpoint, or something that it was made with is missing or
            has changed.
        """
        stage, corpus = resolve_run(run)

        # The weights are a lazy mapping: they are read one by one while the network is filled.
        build, loaded = partial(build_network, stage, corpus), load_weights(run, weights)
        partitioned = partition(build, loaded, dtype, stage.engine) if zero3 else None
        network = partitioned.module if partitioned else _load(run, build(), loaded)

        reader = open_reader(stage, corpus, device)
        # Deferred: a request that is refused, or latents that are never decoded, need no VAE.
        find_vae = partial(load_vae, stage, latents_family(stage, corpus), device)
        sampler = cls(network, reader, find_vae, stage.objective, stage.sample, device, dtype, partitioned)
        # The names are the dataset's, where they can be deleted.
        sampler.users.number_of = partial(find_user, corpus.sources[0].dataset)
        sampler.users.list_names = partial(read_names, corpus.sources[0].dataset)
        return sampler

    @property
    def vae(self) -> LatentSpace:
        """The latent space that made the latents."""
        if self._vae is None:
            self._vae = self._load_vae()
        return self._vae

    def check(self, params: SamplingParams) -> None:
        """Find what is wrong with the settings before the LLMs are loaded.

        Raises:
            UserError: if a size does not divide, the scheduler or a condition is unknown, or steps are out of
            range.
        """
        self.latent_shape(params)
        if params.first_frame and (params.frames == 1 or self.network.sizes.time_levels == 1):
            raise UserError(
                f"--first-frame {params.first_frame}: the network was not trained to go on from a frame, or "
                "--frames is 1: train it with objective.first_frame=0.3"
            )
        extra_conditions(self.network, params, 1, self.device)
        self.users.find(params.user, 1, self.device)
        # On the CPU, because only the validity of the settings matters.
        set_steps(self.solver(params), params.steps, torch.device("cpu"))

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """Return the settings with the number of a user in place of the name, which no record is to have.

        Raises:
            UserError: if the name is unknown.
        """
        return replace(params, user=self.users.without_name(params.user))

    def solver(self, params: SamplingParams) -> Any:
        """Build the scheduler that the settings name.

        Raises:
            UserError: if there is none of that name, or it does not fit the network.
        """
        sizes = sizes_for_solver(self.network, self.parts(params), params.scheduler in ADAPTIVE)
        objective = self.objective
        if objective.shift_positions is not None:
            objective = objective.at_size(math.prod(self.latent_shape(params)[1:]))
        return make_scheduler(objective, params.scheduler, params.adaptive, sizes)

    def parts(self, params: SamplingParams) -> Parts:
        """Return the parts of the network that sample.

        Raises:
            UserError: if the network has no such parts.
        """
        return choose_parts(self.network, params.parts)

    @property
    def schedulers(self) -> list[str]:
        """Names of the schedulers that fit the network, the default first."""
        return scheduler_names(self.objective, self.network.sizes)

    def evaluations(self, params: SamplingParams) -> int:
        """Return how often sampling an image evaluates the network, each branch of guidance counted."""
        own_scale = has_own_scale(bool(params.user), params.guidance, params.user_guidance)
        return count_evaluations(self.solver(params), params.steps, params.guidance, own_scale)

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the shape of one image's latents, (C, h, w), or of a clip's, (C, T, h, w).

        Raises:
            UserError: if the size does not divide.
        """
        patch = largest_patch(self.network, self.parts(params))
        size = params.height, params.width, params.frames
        return sample_latent_shape(self.network, self.vae.downsampling, *size, patch)

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        params: SamplingParams,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample one image's normalized latents per prompt and seed: fp32 [B, C, h, w]."""
        missing = self._batch_size(len(prompts)) - len(prompts)
        # Every rank runs the largest batch: a forward pass under ZeRO-3 needs all ranks, with any inputs.
        filled_prompts, filled_seeds = [*prompts, *[""] * missing], [*seeds, *[0] * missing]
        return self._latents(filled_prompts, filled_seeds, params, on_step)[: len(prompts)]

    def keep_pace(self, params: SamplingParams) -> None:
        """With a partitioned network: run it along with the ranks that still sample, until none does."""
        while size := self._batch_size(0):
            self._latents([""] * size, [0] * size, params, None)

    def _batch_size(self, images: int) -> int:
        """Return how many images this pass samples: with a partitioned network, those of the rank that has
        most."""
        # The maximum over the ranks, as the minimum of the negative numbers.
        return images if self.partitioned is None else -all_reduce_min(-images)

    def _latents(
        self, prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams, on_step: OnStep | None
    ) -> Tensor:
        # An empty negative prompt is the null caption, so plain guidance needs no case of its own.
        condition = self.condition(prompts, params)
        null_condition = self.condition([params.negative] * len(prompts), params)
        null_condition.part = self.parts(params).null
        given: GivenFirstFrame | None = None
        if params.first_frame:
            frame = read_first_frame(Path(params.first_frame), params.height, params.width, self.vae)
            given = GivenFirstFrame(self.network, self.network.sizes, frame)
        sampled = sample_latents(
            given or self.network,
            self.solver(params),
            condition,
            null_condition,
            self.latent_shape(params),
            seeds,
            params.steps,
            params.guidance,
            self.dtype,
            on_step,
            params.user_guidance,
            params.together,
        )
        return given.with_frame(sampled) if given else sampled

    def latents_and_words(
        self, prompts: Sequence[str], seeds: Sequence[int], params: SamplingParams, step: int
    ) -> tuple[Tensor, list[WordMap]]:
        """Sample as `latents`, and record which words the first image's patches attend to.

        Args:
            prompts: one per image.
            seeds: one per image.
            params: settings of sampling.
            step: step whose attention is recorded, from 1; 0 = none.

        Returns:
            The latents, and one map per word of the first prompt.
        """
        if not step:
            return self.latents(prompts, seeds, params), []
        # The input of step 1 is the noise itself; that of a later step is caught by `keep`.
        before = initial_noise(self.latent_shape(params), seeds[:1]).to(self.device)

        def keep(number: int, latents: Tensor) -> Tensor:
            nonlocal before
            if number == step - 1:
                before = latents[:1].clone()
            return latents

        latents = self.latents(prompts, seeds, params, keep)

        # run the step once more, with the attention recorded
        _, time = set_steps(self.solver(params), params.steps, torch.device("cpu"))[step - 1]
        condition = self.condition(prompts[:1], params).at(time)
        shares = attention_to_tokens(self.network, before.to(self.dtype), condition)
        spans = attended(
            self.network.fusion.config, self.reader.of(params.frames).spans(prompts[0], params.without)
        )
        return latents, sum_over_words(prompts[0], spans, shares)

    def condition(self, prompts: Sequence[str], params: SamplingParams) -> Condition:
        """Return the prompts and further conditions as the network reads them; timesteps are zero."""
        reader = self.reader.of(params.frames)
        texts = reader.texts(prompts, self.dtype, params.quantised, params.without)
        if not params.instruction:
            # The prefix is cut off after the LLM has read it: the prompt's own states still depend on it.
            texts = [
                Text(text.states[:, text.prefix :], text.mask[:, text.prefix :], 0, text.padded)
                for text in texts
            ]
        extra = extra_conditions(self.network, params, len(prompts), self.device)
        users = self.users.find(params.user, len(prompts), self.device)
        times, part = torch.zeros(len(prompts), device=self.device), self.parts(params).prompt
        return Condition(times, texts, extra, users=users, part=part)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode normalized latents to pixels fp32 [B, 3, H, W] or [B, 3, T, H, W] in [-1, 1]."""
        return decode_each(self.vae, latents)


def extra_conditions(
    network: LIDiT, params: SamplingParams, count: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the values [count, ...] of the network's further conditions.

    Raises:
        UserError: if a condition is unknown to the network, or its value is not one.
    """
    names = network.sizes.conditions
    if unknown := [name for name in params.conditions if name not in names]:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise UserError(f"condition {unknown[0]}: the network has no such condition, {known}: leave it out")

    extra = {}
    for name in names:
        value = CONDITIONS[name].for_sampling(params.height, params.width, params.conditions.get(name))
        extra[name] = value.to(device).expand(count, *value.shape)
    return extra


def partition(
    build: Callable[[], LIDiT], weights: Mapping[str, Tensor], dtype: torch.dtype, settings: EngineConfig
) -> "PartitionedNetwork":
    """Partition a network over the processes of this start (ZeRO-3).

    Raises:
        UserError: if the weights are those of another network.
    """
    from pipeline.engine.inference import PartitionedNetwork  # imports deepspeed, which takes seconds

    return PartitionedNetwork(build, weights, dtype, settings)


def _load(run: Path, network: LIDiT, weights: Mapping[str, Tensor]) -> LIDiT:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{run}: its weights are those of another network than its stage.yaml describes: {error}"
        ) from error
    return network


def sample_latent_shape(
    network: LIDiT,
    downsampling: int | Sequence[int],
    height: int,
    width: int,
    frames: int = 1,
    patch: int | None = None,
) -> tuple[int, ...]:
    """Return the shape of one image's latents, (C, h, w), or of a clip's, (C, T, h, w).

    Args:
        network: gives channels and patches.
        downsampling: of the latent space, one number or one per axis.
        height: in pixels.
        width: in pixels.
        frames: of a clip; an image has 1.
        patch: side of the largest patch; None = the network's.

    Raises:
        UserError: if the size does not divide, or the network has no frames.
    """
    patch, clips = patch or network.sizes.patch, encodes_clips(downsampling)
    factors = side_downsampling(downsampling)
    if frames > 1 and not clips:
        raise UserError(f"{frames} frames: this network generates images alone: leave the frames out")
    # The network cuts the latents into patches, so each side must be a whole number of them.
    for side, factor in zip((height, width), factors, strict=True):
        if side < factor * patch or side % (factor * patch):
            raise UserError(f"size {height}x{width}: each side has to be a multiple of {factor * patch}")

    positions = latent_sizes(downsampling, height, width, frames if clips else None)
    if clips:
        replace(network.sizes, patch=patch).patch_grid(positions)
    return network.sizes.channels, *positions


def decode_each(vae: LatentSpace, latents: Tensor) -> Tensor:
    """Decode latents one by one: large images fit into memory, and none depends on another."""
    return torch.cat([vae.decode(latent) for latent in latents.split(1)])


def load_vae(stage: StageConfig, latents: Family, device: torch.device) -> LatentSpace:
    """Load the latent space that wrote a stage's latents.

    Raises:
        UserError: if it is missing, or another one.
    """
    # A folder that the stage names has no revision on the hub; `identity` below compares the weights.
    source = stage.vae or str(latents.info["vae"])
    # A folder that the stage names says itself what it holds, such as a small space with the same latents.
    names_itself = (Path(stage.vae) / CONFIG).is_file() if stage.vae else False
    space = "" if names_itself else latents.identity.get("space", AUTOENCODER_KL)
    vae = load_latent_space(source, None if stage.vae else latents.info["revision"], device, space)
    # Another VAE would decode without an error, in wrong colors and structure.
    if not same_latents(vae.identity, latents.identity):
        raise UserError(
            f"VAE {source} is not the one that wrote the family `{latents.name}`: name that one by vae= in "
            "the stage"
        )
    return vae
