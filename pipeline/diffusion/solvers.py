"""From noise to latents: diffusers' schedulers, with classifier-free guidance in one batch.

The scheduler's state and the latents stay fp32; only the network runs in a lower precision. Each image has its own
seed and its own noise generator, so it is the same in a batch of any size and at any place in it: on the CPU bit for bit, since
the network takes one image at a time there; on a GPU up to rounding, and bit for bit in batches of one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from model.common.errors import UserError
from model.fusion import Text
from pipeline.diffusion.objective import DDPM_BETAS, DDPM_STEPS
from pipeline.stage.config import ObjectiveConfig

Predict = Callable[[Tensor, Tensor, list[Text]], Tensor]
"""Noisy latents [B / branches, C, h, w], times fp32 [B] in [0, 1], one `Text` per LLM -> prediction [B, C, h, w]."""

OnStep = Callable[[int, Tensor], Tensor]
"""Number of the step just done, from 1, and the latents -> the latents to go on with."""

_DDPM: dict[str, Any] = {
    "num_train_timesteps": DDPM_STEPS,
    "beta_start": DDPM_BETAS[0],
    "beta_end": DDPM_BETAS[1],
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",  # start from the noisiest step (Lin et al. 2023, section 3.3)
}
SCHEDULERS: dict[str, dict[str, Callable[[ObjectiveConfig], Any]]] = {
    "flow": {
        "euler": lambda config: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.shift),
        "dpm": lambda config: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
        ),
    },
    "ddpm": {
        "dpm": lambda config: DPMSolverMultistepScheduler(**_DDPM),
        # DPM-Solver of first order is DDIM (Lu et al. 2022, section 4.1); diffusers' own DDIM does not reach the clean
        # latents unless the steps divide 1,000.
        "ddim": lambda config: DPMSolverMultistepScheduler(**_DDPM, solver_order=1),
    },
}
"""Objective -> name -> diffusers scheduler; the first of each is the default."""


def make_scheduler(objective: ObjectiveConfig, name: str = "") -> Any:
    """The scheduler `name` for the objective; empty = the objective's default.

    Raises:
        UserError: no such scheduler, or it does not fit the objective.
    """
    known = SCHEDULERS[objective.name]
    name = name or next(iter(known))
    if name not in known:
        raise UserError(f"scheduler {name!r} does not exist for objective {objective.name}: take one of {', '.join(known)}")
    return known[name](objective)


def set_steps(scheduler: Any, steps: int, device: torch.device) -> list[tuple[Tensor, float]]:
    """Set the number of steps; returns for each the scheduler's own timestep and the time in [0, 1] that the network reads.

    Raises:
        UserError: the number of steps is out of range.
    """
    if not 1 <= steps <= DDPM_STEPS:
        raise UserError(f"steps={steps}: set a number between 1 and {DDPM_STEPS}")
    if "shift" in scheduler.config:
        # The flow-matching schedulers shift their last time twice by default; from these even times they shift each once.
        scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    # Flow times are the scheduler's sigmas: its integer timesteps would round them.
    flow = scheduler.config.get("prediction_type") != "epsilon"
    times = scheduler.sigmas[:-1] if flow else scheduler.timesteps / DDPM_STEPS
    return list(zip(scheduler.timesteps, times.tolist(), strict=True))


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Gaussian noise fp32 [len(seeds), *shape] on the CPU, so that a seed means the same image on each device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def stack_texts(*texts: Text) -> Text:
    """The samples of batches of one LLM after one another, padded on the right to the longest."""
    length = max(text.states.shape[1] for text in texts)
    states = torch.cat([F.pad(text.states, (0, 0, 0, length - text.states.shape[1])) for text in texts])
    mask = torch.cat([F.pad(text.mask, (0, length - text.mask.shape[1])) for text in texts])
    return Text(states, mask, texts[0].prefix, any(text.padded or text.states.shape[1] < length for text in texts))


def guided(predict: Predict, texts: list[Text], null_texts: list[Text], guidance: float) -> Callable[[Tensor, float], Tensor]:
    """A prediction with classifier-free guidance (Ho and Salimans 2022), both branches in one batch; none at guidance 1.

    On the CPU each image is a batch of its own. Of all operations two depend on the other images there: matrix products of few
    rows (of the conditions, a row an image) and attention to padded texts; both sum in another order for other shapes. Batches
    gain nothing on the CPU, where one image's patches fill a product.

    The returned function takes noisy latents [B, C, h, w] and a time in [0, 1] and returns fp32 [B, C, h, w].
    """
    branches = [texts] if guidance == 1.0 else [texts, null_texts]
    if texts[0].states.device.type == "cpu":
        groups = [[[_one(text, row) for text in branch] for branch in branches] for row in range(len(texts[0].states))]
    else:
        groups = [branches]
    stacked = [[stack_texts(*of_llm) for of_llm in zip(*group, strict=True)] for group in groups]

    def evaluate(latents: Tensor, time: float) -> Tensor:
        return torch.cat([of_group(part, time, group) for part, group in zip(latents.chunk(len(stacked)), stacked, strict=True)])

    def of_group(latents: Tensor, time: float, group: list[Text]) -> Tensor:
        times = torch.full((len(branches) * len(latents),), time, dtype=torch.float32, device=latents.device)
        prediction = predict(latents, times, group).float()
        if guidance == 1.0:
            return prediction
        with_text, without = prediction.chunk(2)
        return without + guidance * (with_text - without)

    return evaluate


def _one(text: Text, row: int) -> Text:
    """One sample of a batch, without its padding."""
    tokens = int(text.mask[row].sum())
    return Text(text.states[row : row + 1, :tokens], text.mask[row : row + 1, :tokens], text.prefix, padded=False)


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    texts: list[Text],
    null_texts: list[Text],
    noise: Tensor,
    steps: int,
    guidance: float,
    dtype: torch.dtype,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follow a scheduler from noise fp32 [B, C, h, w] to normalised latents; see `draw`.

    Raises:
        UserError: the number of steps is out of range.
    """
    evaluate = guided(lambda x, t, text: predict(x.to(dtype), t, text), texts, null_texts, guidance)
    latents = noise.float()
    for number, (timestep, time) in enumerate(set_steps(scheduler, steps, latents.device), 1):
        latents = scheduler.step(evaluate(latents, time), timestep, latents, return_dict=False)[0]
        if on_step is not None:
            latents = on_step(number, latents)
    return latents


def draw(
    predict: Predict,
    objective: ObjectiveConfig,
    texts: list[Text],
    null_texts: list[Text],
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    device: torch.device,
    dtype: torch.dtype,
    scheduler: str = "",
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one image's normalised latents per seed.

    Args:
        predict: the network.
        objective: what it was trained to predict.
        texts: one `Text` per LLM, B = len(seeds) samples each; on `device`.
        null_texts: the same for the null (or the negative) caption; not read at guidance 1.
        shape: (C, h, w) of one image's latents.
        seeds: one per image.
        steps: evaluations of the network per image.
        guidance: 1 = none.
        device: where the network runs.
        dtype: in which precision the network gets the latents.
        scheduler: a name in `SCHEDULERS`; empty = the objective's default.
        on_step: called after each step.

    Returns:
        Latents fp32 [B, C, h, w] on `device`.

    Raises:
        UserError: unknown scheduler or number of steps out of range.
    """
    noise = initial_noise(shape, seeds).to(device)
    solver = make_scheduler(objective, scheduler)
    return denoise(predict, solver, texts, null_texts, noise, steps, guidance, dtype, on_step)
