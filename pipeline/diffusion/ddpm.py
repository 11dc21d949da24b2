"""The paper's objective: DDPM's epsilon-prediction (appendix A.1; Ho et al. 2020)."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.diffusion.objective import OBJECTIVES, Objective

DDPM_STEPS = 1000
DDPM_BETAS = (0.00085, 0.012)
"""Ends of the "scaled linear" schedule of latent diffusion (Rombach et al. 2022); the paper names no
schedule."""

_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": DDPM_STEPS,
    "beta_start": DDPM_BETAS[0],
    "beta_end": DDPM_BETAS[1],
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",  # start from the noisiest step (Lin et al. 2023, section 3.3)
}


@functools.cache
def ddpm_alphas() -> Tensor:
    """Share of signal variance that is left after each of the DDPM steps, fp32 [1000]: the cumulative product
    of 1 - beta.

    Computed as diffusers' schedulers do, so that training and sampling agree to the bit.
    """
    first, last = DDPM_BETAS
    betas = torch.linspace(first**0.5, last**0.5, DDPM_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def _dpm_solver(**settings: Any) -> Any:
    # imported by the commands that sample, as in `flow`
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**_SCHEDULER, **settings)


@OBJECTIVES.register("ddpm")
class DDPM(Objective):
    """1,000 steps of noise, each as likely as another; a timestep is step / 1000."""

    schedulers: ClassVar = {
        "dpm": lambda config: _dpm_solver(),
        # DPM-Solver of first order is DDIM (Lu et al. 2022, section 4.1); diffusers' own DDIM does not reach
        # the clean latents unless the steps divide 1,000.
        "ddim": lambda config: _dpm_solver(solver_order=1),
    }

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform `u` [B] to steps, fp32 [B] in [0, 1)."""
        # fp64 makes the product exact, so no step gets samples of its neighbor by rounding.
        return (u.double() * DDPM_STEPS).long().clamp(0, DDPM_STEPS - 1).float() / DDPM_STEPS

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clean latents with noise at the nearest step; the target is the noise (Ho et al. 2020, equation
        4)."""
        clean, noise = clean.float(), noise.float()
        # Rounded and not cut off: step / 1000 in fp32 may be slightly below the step.
        step = (timesteps.double() * DDPM_STEPS).round().long().clamp(0, DDPM_STEPS - 1)
        alpha = self.per_position(ddpm_alphas().to(clean.device)[step], clean)
        return alpha.sqrt() * clean + (1.0 - alpha).sqrt() * noise, noise
