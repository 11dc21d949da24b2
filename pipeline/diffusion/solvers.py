"""From noise to latents: diffusers' schedulers, with classifier-free guidance in one batch.

The scheduler's state and the latents stay fp32; only the network runs in a lower precision. Each image has
its own seed and its own noise generator, so it is the same in a batch of any size and at any place in it: on
the CPU bit for bit, since the network takes one image at a time there if nothing else is asked for; on a GPU
up to rounding, and bit for bit in batches of one.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model.common.errors import UserError
from model.condition import Condition, Predict
from model.config import DiTConfig
from pipeline.diffusion.adaptive import ADAPTIVE, AdaptiveSolver
from pipeline.diffusion.ddpm import DDPM_STEPS
from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.objective import OBJECTIVES
from pipeline.stage.objective import ObjectiveConfig
from pipeline.stage.sampling import AdaptiveConfig

OnStep = Callable[[int, Tensor], Tensor]
"""Number of the step just done, from 1, and the latents -> the latents to continue with."""

Step = tuple[Tensor, float]
"""The scheduler's own timestep, and the time in [0, 1] that the network reads."""

_DECIDES_NOISE = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
    "use_flow_sigmas",
)
"""Fields of a scheduler's config that have to be those of training; others (order, shift) are free."""


def make_scheduler(
    objective: ObjectiveConfig,
    name: str = "",
    adaptive: AdaptiveConfig | None = None,
    sizes: DiTConfig | None = None,
) -> Any:
    """Build the scheduler `name` for the objective: a diffusers scheduler or an `AdaptiveSolver`.

    Args:
        objective: what the network was trained to predict.
        name: empty = the objective's default.
        adaptive: settings of the solvers that follow the difficulty of patches; None = the defaults.
        sizes: of the network; needed for those solvers.

    Raises:
        UserError: if there is no such scheduler, or it does not fit the objective or the network.
    """
    known = OBJECTIVES[objective.name].schedulers
    name = name or next(iter(known))
    if refusal := _refusal(objective, name, sizes):
        raise UserError(f"scheduler {name!r} {refusal}")

    # Built for each call, because a diffusers scheduler keeps the state of one trajectory.
    if name in known:
        return known[name](objective)
    assert sizes is not None, "`_refusal` lets only schedulers that need no network pass without one"
    return ADAPTIVE[name](
        known["euler"](objective), objective, adaptive or AdaptiveConfig(), sizes.patch_shape
    )


def scheduler_names(objective: ObjectiveConfig, sizes: DiTConfig | None = None) -> list[str]:
    """Return the names of the schedulers that `make_scheduler` builds for an objective and a network, the
    default first."""
    names = [*OBJECTIVES[objective.name].schedulers, *ADAPTIVE]
    return [name for name in names if not _refusal(objective, name, sizes)]


def _refusal(objective: ObjectiveConfig, name: str, sizes: DiTConfig | None) -> str:
    """Return why a scheduler does not fit an objective and a network; empty = it fits."""
    known = OBJECTIVES[objective.name].schedulers
    following = ADAPTIVE if OBJECTIVES[objective.name].patch_times else {}
    if name in following and (sizes is None or sizes.difficulty == "none"):
        return (
            "follows the difficulty of patches, which this network does not predict: train with "
            f"objective.difficulty=0.01, or take one of {', '.join(known)}"
        )
    if name == "dpm" and objective.patch_times.kind != "shared":
        return (
            "continues from predictions of earlier times, one for all patches, and the network was trained "
            "with objective.patch_times: take euler"
        )
    if name not in known and name not in following:
        return f"does not exist for objective {objective.name}: take one of {', '.join([*known, *following])}"
    return ""


def scheduler_misfit(scheduler: Any, objective: ObjectiveConfig) -> str:
    """Return what a scheduler lacks to read the predictions of an objective; empty = nothing.

    Another class, or another kind of prediction or noise, would give an image, but a wrong one.
    """
    known = [make_scheduler(objective, name) for name in scheduler_names(objective)]
    same = [each for each in known if type(each) is type(scheduler)]
    if not same:
        return " or ".join(dict.fromkeys(type(each).__name__ for each in known))
    needed = {key: value for key, value in same[0].config.items() if key in _DECIDES_NOISE}
    return ", ".join(
        f"{key}={value!r}" for key, value in needed.items() if scheduler.config.get(key) != value
    )


def find_objective(scheduler: Any) -> str:
    """Return the name of the objective whose predictions a scheduler reads.

    Raises:
        UserError: if there is none.
    """
    for name in OBJECTIVES:
        if not scheduler_misfit(scheduler, ObjectiveConfig(name=name)):
            return name
    raise UserError(f"scheduler {type(scheduler).__name__}: reads no objective of {', '.join(OBJECTIVES)}")


def set_steps(scheduler: Any, steps: int, device: torch.device) -> list[Step]:
    """Set the number of steps, and return them.

    Raises:
        UserError: if the number of steps is out of range.
    """
    if not 1 <= steps <= DDPM_STEPS:
        raise UserError(f"steps={steps}: set a number between 1 and {DDPM_STEPS}")

    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, AdaptiveSolver):
        scheduler = scheduler.euler
    if issubclass(type(scheduler), FlowMatchEulerDiscreteScheduler):
        # The flow-matching schedulers shift their last time twice by default; from these even times they
        # shift each once.
        scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)

    return _planned_steps(scheduler)


def set_schedule(scheduler: Any, name: str, values: Sequence[float], device: torch.device) -> list[Step]:
    """Set the steps themselves.

    Args:
        scheduler: a diffusers scheduler.
        name: `sigmas`, noise levels in (0, 1] before the scheduler's shift, or `timesteps` in [0, 1000].
        values: falling, one per step.
        device: device of the timesteps.

    Returns:
        The steps, as `set_steps` returns them.

    Raises:
        UserError: if the scheduler takes no such steps, or they are out of range.
    """
    takes = name in inspect.signature(scheduler.set_timesteps).parameters
    # With flow sigmas, diffusers' multistep scheduler would take other steps than those given.
    if not takes or scheduler.config.get("use_flow_sigmas"):
        kind = type(scheduler).__name__
        raise UserError(f"{name}=: {kind} takes none here: give num_inference_steps=, or another scheduler")

    numbers = [float(value) for value in values]
    # The network of DDPM knows the timesteps 0 to 999.
    last = (
        1.0 if name == "sigmas" else DDPM_STEPS - float(scheduler.config.get("prediction_type") == "epsilon")
    )
    is_falling = all(now > then for now, then in pairwise(numbers))
    in_range = all(0.0 <= number <= last for number in numbers) and (name != "sigmas" or 0.0 not in numbers)
    if not (1 <= len(numbers) <= DDPM_STEPS and is_falling and in_range):
        raise UserError(f"{name}=: give at most {DDPM_STEPS} falling numbers, none above {last:g} or below 0")
    try:
        scheduler.set_timesteps(**{name: numbers}, device=device)
    except ValueError as error:
        raise UserError(f"{name}=: {error}: give num_inference_steps= instead") from error
    return _planned_steps(scheduler)


def _planned_steps(scheduler: Any) -> list[Step]:
    # Flow times are the scheduler's sigmas: its integer timesteps would round them.
    flow = scheduler.config.get("prediction_type") != "epsilon"
    times = scheduler.sigmas[:-1] if flow else scheduler.timesteps / DDPM_STEPS
    return list(zip(scheduler.timesteps, times.tolist(), strict=True))


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Return normal noise fp32 [len(seeds), *shape] on the CPU, so that a seed means the same image on each
    device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def take_step(solver: Any, evaluate: Guided, latents: Tensor, timestep: Tensor, time: float) -> Tensor:
    """Take one step of those that `set_steps` returned: fp32 latents [B, C, ...] -> the same at its end."""
    if isinstance(solver, AdaptiveSolver):
        return solver.advance(evaluate, latents, timestep)
    return solver.step(evaluate(latents, time), timestep, latents, return_dict=False)[0]


def follow(
    solver: Any,
    plan: Sequence[Step],
    guide: Callable[[], Guided | None],
    noise: Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take the planned steps from noise to latents.

    Args:
        solver: the scheduler, or an `AdaptiveSolver`.
        plan: the steps.
        guide: called before each step, returns the network with its guidance; None = take no more steps.
        noise: [B, C, ...] on the network's device.
        on_step: called after each step.

    Returns:
        Latents fp32 [B, C, ...].
    """
    # The solver's own state is fp32 in every precision: in bf16 the errors of many small steps would add up.
    latents = noise.float()
    for number, (timestep, time) in enumerate(plan, 1):
        evaluate = guide()
        if evaluate is None:
            break
        latents = take_step(solver, evaluate, latents, timestep, time)
        if on_step is not None:
            latents = on_step(number, latents)
    return latents


def count_evaluations(solver: Any, steps: int, guidance: float, own_scale: bool = False) -> int:
    """Return how often sampling an image evaluates the network, each branch of guidance counted; `own_scale`
    = its user has a scale of its own."""
    branches = (1 if guidance == 1.0 else 2) + own_scale
    times = [time for _, time in set_steps(solver, steps, torch.device("cpu"))]
    if isinstance(solver, AdaptiveSolver):
        return solver.evaluations(times, branches)
    return len(times) * branches


@torch.no_grad()
def sample_latents(
    predict: Predict,
    solver: Any,
    condition: Condition,
    null_condition: Condition,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    dtype: torch.dtype,
    on_step: OnStep | None = None,
    user_guidance: float | None = None,
    together: bool = False,
) -> Tensor:
    """Sample one image's normalized latents per seed.

    Args:
        predict: the network.
        solver: what `make_scheduler` returned.
        condition: texts and further conditions of B = len(seeds) samples, on the network's device.
        null_condition: the same of the null or the negative captions; not read at guidance 1.
        shape: (C, h, w) or (C, T, h, w) of one sample's latents.
        seeds: one per image.
        steps: evaluations of the network per image.
        guidance: 1 = none.
        dtype: precision of the latents that the network gets.
        on_step: called after each step.
        user_guidance: scale of the users; None = that of the text.
        together: the network takes all images at once on the CPU too.

    Returns:
        Latents fp32 [B, *shape] on the condition's device.

    Raises:
        UserError: if the number of steps is out of range.
    """
    # Noise is made on the CPU and then moved, so it does not depend on the kind of device.
    noise = initial_noise(shape, seeds).to(condition.timesteps.device)

    def predict_in_dtype(latents: Tensor, given: Condition) -> Tensor:
        return predict(latents.to(dtype), given)

    evaluate = Guided(predict_in_dtype, condition, null_condition, guidance, user_guidance, together)
    return follow(solver, set_steps(solver, steps, noise.device), lambda: evaluate, noise, on_step)
