"""Maps of the error that the network expects of an image's patches, at several steps of sampling, and strips
of what the network reads there, with patches at different times."""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from model.common.errors import UserError
from model.condition import Condition
from pipeline.diffusion.difficulty import patch_log_variances
from pipeline.diffusion.solvers import initial_noise, set_steps
from pipeline.inference.attention_maps import overlay
from pipeline.inference.images import make_grid, to_images
from pipeline.inference.sampler import Sampler, SamplingParams

MAX_EVALUATIONS = 8
"""Most evaluations whose inputs are shown of an image."""
MAX_MAPS = 5
"""Most steps that are shown of an image, the first and the last among them."""


@dataclass(frozen=True)
class DifficultyMap:
    """The expected errors before one step."""

    time: float
    log_variance: Tensor
    """fp32 [rows, columns], on the CPU."""

    @property
    def label(self) -> str:
        """Name of the map, for people."""
        return f"expected error, t {self.time:.2f}"


@dataclass(frozen=True)
class NetworkInput:
    """Input of the network in one evaluation."""

    evaluation: int
    """Its number, from 1; the branches of guidance are one evaluation here."""
    latents: Tensor
    """Normalized latents fp32 [1, C, h, w]."""
    times: tuple[float, ...]
    """Times that its patches are at, falling."""

    @property
    def label(self) -> str:
        """Name of the input, for people."""
        return f"evaluation {self.evaluation}, t {' and '.join(f'{time:.2f}' for time in self.times)}"


def check_maps(sampler: Sampler) -> None:
    """Check that a network can show what it expects.

    Raises:
        UserError: if it has no head, or is partitioned.
    """
    if sampler.network.sizes.difficulty == "none":
        raise UserError(
            "difficulty: this network does not predict that of patches: train with "
            "objective.difficulty=0.01, or ask for no maps"
        )
    if sampler.partitioned is not None:
        raise UserError("difficulty with --zero3: ranks would wait for each other: leave one of them out")


def _evenly(count: int, most: int) -> list[int]:
    """Return up to `most` of the indices below `count`, evenly chosen, the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().int().tolist()


@torch.no_grad()
def difficulty_maps(
    sampler: Sampler, prompt: str, seed: int, params: SamplingParams
) -> tuple[Tensor, list[DifficultyMap]]:
    """Sample an image, and record its patches' expected errors before up to `MAX_MAPS` of the steps.

    Each map takes one evaluation more, of the prompt without guidance, so that all schedulers have maps.

    Returns:
        The normalized latents fp32 [1, C, h, w], and the maps from noise to image.
    """
    times = [time for _, time in set_steps(sampler.solver(params), params.steps, torch.device("cpu"))]
    shown = _evenly(len(times), MAX_MAPS)
    # Latents before a step are those after the step before it; before the first, the noise.
    before = {0: initial_noise(sampler.latent_shape(params), [seed]).to(sampler.device)}

    def keep(number: int, latents: Tensor) -> Tensor:
        if number in shown:
            before[number] = latents.clone()
        return latents

    latents = sampler.latents([prompt], [seed], params, keep)
    condition = replace(sampler.condition([prompt], params), with_difficulty=True)

    maps = []
    for step in shown:
        now = condition.at(times[step])
        output = sampler.network(before[step].to(sampler.dtype), now)
        sizes = sampler.network.route(now.part).sizes
        expected = patch_log_variances(output[:, -1:], sizes.patch_shape)[0]
        expected = expected.unflatten(0, sizes.patch_grid(latents.shape[2:]))
        maps.append(DifficultyMap(times[step], expected.cpu()))
    return latents, maps


def show_difficulty(sampler: Sampler, prompt: str, seed: int, params: SamplingParams) -> Image.Image:
    """Return an image next to its maps as heat, each with its time; bright = a large expected error."""
    latents, maps = difficulty_maps(sampler, prompt, seed, params)
    (image,) = to_images(sampler.pixels(latents))
    heat = [overlay(image, each.log_variance, max(image.size)) for each in maps]
    return make_grid([image, *heat], [prompt, *(each.label for each in maps)])


@torch.no_grad()
def network_inputs(sampler: Sampler, prompt: str, seed: int, params: SamplingParams) -> list[NetworkInput]:
    """Sample an image, and return what the network reads in up to `MAX_EVALUATIONS` evaluations."""
    seen: list[NetworkInput] = []

    def record(_: torch.nn.Module, inputs: tuple[Tensor, Condition]) -> None:
        latents, condition = inputs
        times = condition.timesteps[:1].flatten().unique().flip(0).tolist()
        # Copied to the host: all evaluations together may not fit beside the network.
        seen.append(NetworkInput(len(seen) + 1, latents[:1].float().cpu(), tuple(times)))

    handle = sampler.network.register_forward_pre_hook(record)
    try:
        sampler.latents([prompt], [seed], params)
    finally:
        handle.remove()

    return [seen[index] for index in _evenly(len(seen), MAX_EVALUATIONS)]


def show_patches(sampler: Sampler, prompt: str, seed: int, params: SamplingParams) -> Image.Image:
    """Return a strip of what the network reads on the way to an image, decoded: with `dual_loop` and
    `look_ahead`, easy patches arrive before hard ones."""
    inputs = network_inputs(sampler, prompt, seed, params)
    pixels = [sampler.pixels(each.latents.to(sampler.device)) for each in inputs]
    return make_grid(to_images(torch.cat(pixels)), [each.label for each in inputs])
