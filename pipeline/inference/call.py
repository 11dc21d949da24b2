"""The diffusers pipeline's call: arguments, which are checked before anything is computed, and the loop over
the steps."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.common.errors import UserError
from model.common.settings import settings_from
from model.condition import Condition, Text
from model.config import DiTConfig
from pipeline.diffusion.adaptive import ADAPTIVE, AdaptiveSolver
from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.solvers import Step, follow, initial_noise, make_scheduler, set_schedule, set_steps
from pipeline.inference.images import to_images
from pipeline.stage.objective import ObjectiveConfig, PatchTimesConfig
from pipeline.stage.sampling import AdaptiveConfig

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


Callback = Callable[..., dict[str, Tensor] | None]
"""Called after each step as (pipeline, step from 0, timestep, tensors by name); may return new ones."""


class DenoisingLoop:
    """The loop of a diffusers pipeline, with what its callbacks may read and set."""

    transformer: Any
    scheduler: Any
    progress_bar: Any

    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False
    user_guidance: float | None = None

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call; a callback may set `_guidance_scale` for the next steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the negative prompts are read too."""
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True if a callback has set `_interrupt`: the steps that are left are not taken."""
        return self._interrupt

    def denoise(
        self,
        condition: Condition,
        null_condition: Condition,
        noise: Tensor,
        solver: Any,
        plan: Sequence[Step],
        guidance: float,
        callback: Callback | None,
        names: Sequence[str],
    ) -> Tensor:
        """Follow the solver, with a callback after each step.

        Args:
            condition: texts and further conditions of the prompts.
            null_condition: the same of the negative prompts.
            noise: [B, C, h, w] on the network's device.
            solver: the scheduler, or an `AdaptiveSolver` around it.
            plan: the steps.
            guidance: 1 = none.
            callback: called after each step.
            names: of the tensors that the callback gets.

        Returns:
            Normalized latents, fp32.
        """

        def predict(latents: Tensor, given: Condition) -> Tensor:
            return self.transformer(latents.to(self.transformer.dtype), given, return_dict=False)[0]

        self._guidance_scale, self._num_timesteps, self._interrupt = guidance, len(plan), False
        evaluate = Guided(predict, condition, null_condition, guidance, self.user_guidance)

        def guide() -> Guided | None:
            nonlocal evaluate
            # a callback may have set another guidance
            if evaluate.guidance != self.guidance_scale:
                scales = self.guidance_scale, self.user_guidance
                evaluate = Guided(predict, condition, null_condition, *scales)
            return None if self.interrupt else evaluate

        with self.progress_bar(total=len(plan)) as bar:

            def after(number: int, latents: Tensor) -> Tensor:
                if callback is not None:
                    tensors = {"latents": latents} if "latents" in names else {}
                    returned = callback(self, number - 1, plan[number - 1][0], tensors) or {}
                    latents = returned.get("latents", latents)
                bar.update()
                return latents

            return follow(solver, plan, guide, noise, after)


def objective_of(config: Mapping[str, Any], scheduler: Any) -> ObjectiveConfig:
    """Return the settings of the objective that a network was trained for, as far as sampling reads them.

    Args:
        config: of the pipeline.
        scheduler: of the pipeline, which has the objective's shift.
    """
    schedule = scheduler.config
    return ObjectiveConfig(
        name=config["objective"],
        shift=schedule.get("shift", schedule.get("flow_shift", 1.0)),
        patch_times=settings_from(PatchTimesConfig, config["patch_times"], "patch_times"),
    )


def choose_solver(name: str | None, config: Mapping[str, Any], scheduler: Any, sizes: DiTConfig) -> Any:
    """Return what takes the steps: the scheduler, or the solver of a name, which takes them at its times.

    Args:
        name: of the solver; empty = the scheduler; None = the pipeline's default.
        config: of the pipeline.
        scheduler: of the pipeline.
        sizes: of the network.

    Raises:
        UserError: if there is no such solver, or it does not fit the network or the scheduler.
    """
    name = config["solver"] if name is None else name
    if not name:
        return scheduler

    settings = settings_from(AdaptiveConfig, config["adaptive"], "adaptive")
    solver = make_scheduler(objective_of(config, scheduler), name, settings, sizes)
    if not isinstance(solver, AdaptiveSolver):
        raise UserError(
            f"solver={name!r} is a scheduler: give it to the pipeline; solvers are {', '.join(ADAPTIVE)}"
        )
    if type(scheduler) is not type(solver.euler):
        raise UserError(
            f"solver={name!r} beside {type(scheduler).__name__}: give the pipeline a "
            f"{type(solver.euler).__name__}"
        )

    solver.euler = scheduler
    return solver


def plan_steps(
    scheduler: Any,
    steps: Any,
    default: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    device: torch.device,
) -> list[Step]:
    """Return the steps of a call: as many as asked for, or those that are given.

    Args:
        scheduler: of the pipeline.
        steps: their number; None = the default, or as many as are given.
        default: number of steps.
        sigmas: noise levels of the steps.
        timesteps: instead of `sigmas`.
        device: device of the timesteps.

    Raises:
        UserError: if one contradicts another, is out of range, or is not for this scheduler.
    """
    custom = {
        name: given for name, given in (("sigmas", sigmas), ("timesteps", timesteps)) if given is not None
    }
    if not custom:
        return set_steps(scheduler, whole_number("num_inference_steps", steps, default), device)
    if len(custom) > 1:
        raise UserError("sigmas= beside timesteps=: each decides all steps: give one of them")
    ((name, values),) = custom.items()
    if whole_number("num_inference_steps", steps, len(values)) != len(values):
        raise UserError(f"num_inference_steps={steps} beside {len(values)} {name}: leave one of them out")
    return set_schedule(scheduler, name, values, device)


def refuse_attention_kwargs(**given: Mapping[str, Any] | None) -> None:
    """Refuse arguments for attention processors, which the network has none of.

    Raises:
        UserError: if one is given.
    """
    for name, values in given.items():
        if values:
            raise UserError(f"{name}=: the network has no attention processors to read it: leave it out")


def check_output_type(output_type: str) -> None:
    """Check the name of an output type.

    Raises:
        UserError: if there is no such type.
    """
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type={output_type!r}: take one of {', '.join(OUTPUT_TYPES)}")


def whole_number(name: str, given: Any, default: int) -> int:
    """Return an argument that counts something, or its default for None.

    Raises:
        UserError: if it is not a whole number of at least 1.
    """
    if given is None:
        return default
    if not isinstance(given, Integral) or given < 1:
        raise UserError(f"{name}={given!r}: give a whole number of at least 1")
    return int(given)


def list_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """Return one prompt or several as a list.

    Raises:
        UserError: if there is none, or if one is not a text.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    texts = isinstance(prompts, list | tuple) and all(isinstance(each, str) for each in prompts)
    if not texts or not prompts:
        raise UserError(f"{name}={prompt!r}: give a text, or a list of at least one")
    return list(prompts)


def list_negatives(negative: Any, count: int) -> list[str]:
    """Return a negative prompt for each of `count` prompts: one for all, one each, or None = the null
    caption.

    Raises:
        UserError: if it is none of these.
    """
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    negatives = list_prompts(negative, "negative_prompt")
    if len(negatives) != count:
        raise UserError(
            f"negative_prompt: {len(negatives)} texts for {count} prompts: give one text, or one per prompt"
        )
    return negatives


def check_embeds(name: str, embeds: Any, count: int | None = None) -> list[Text]:
    """Return prompts that `encode_prompt` has read; none for None.

    Args:
        name: of the argument.
        embeds: the argument.
        count: how many prompts there have to be; None = any number.

    Raises:
        UserError: if they are not such prompts, or too many or too few.
    """
    if embeds is None:
        return []
    if not isinstance(embeds, list | tuple) or not embeds or not all(isinstance(e, Text) for e in embeds):
        raise UserError(f"{name}: {type(embeds).__name__} is not what encode_prompt returns: pass that")
    prompts = len(embeds[0].mask)
    if prompts == 0 or count not in (None, prompts):
        raise UserError(f"{name}: {prompts} prompts, not {count or 'at least 1'}: encode as many")
    return list(embeds)


def place_texts(texts: Sequence[Text], times: int, device: torch.device, dtype: torch.dtype) -> list[Text]:
    """Return each prompt's texts `times` times, one after another, on a device."""
    return [text.repeat(times).to(device, dtype) for text in texts]


def make_noise(
    shape: Sequence[int],
    images: int,
    per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
    seed: int | None,
    latents: Tensor | None,
) -> Tensor:
    """Return the noise [images, *shape]: the one that is given, or fp32 on the CPU from seed or generators.

    Args:
        shape: of one image's latents.
        images: number of images.
        per_prompt: images of each prompt.
        generator: one for all images, or one per image.
        seed: of the first image of each prompt; the others have the next ones.
        latents: the noise itself.

    Raises:
        UserError: if more than one of the sources is given, or the number of generators or the shape is
            wrong.
    """
    if seed is not None and (generator is not None or latents is not None):
        raise UserError("seed= beside generator= or latents=: each decides the noise: give one of them")
    if latents is not None:
        if tuple(latents.shape) != (images, *shape):
            raise UserError(
                f"latents of shape {list(latents.shape)}: {images} images of this height and width take "
                f"{[images, *shape]}: give noise of that shape, or other height= and width="
            )
        return latents
    if generator is None:
        # with `seed`, on the CPU in fp32, so that the noise is the same on any device; without, a random seed
        first = int(torch.randint(2**31, ())) if seed is None else seed
        return initial_noise(shape, [first + number % per_prompt for number in range(images)])

    generators = generator if isinstance(generator, list) else [generator] * images
    if len(generators) != images:
        raise UserError(f"{len(generators)} generators for {images} images: give one, or one per image")
    # torch samples with a generator only on that generator's own device
    return torch.stack([torch.randn(*shape, generator=own, device=own.device).cpu() for own in generators])


def to_output(pixels: Tensor, output_type: str) -> Any:
    """Return pixels [B, 3, H, W] in [-1, 1] as an output type other than `latent`."""
    if output_type == "pil":
        return to_images(pixels)
    unit = (pixels + 1.0) / 2.0
    return unit if output_type == "pt" else np.asarray(unit.permute(0, 2, 3, 1).cpu())
