"""Rectified flow: the network predicts the velocity (Liu et al. 2022)."""

from typing import ClassVar

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipeline.diffusion.objective import OBJECTIVES, Objective


@OBJECTIVES.register("flow")
class Flow(Objective):
    """Straight lines from data (t = 0) to noise (t = 1); the velocity is their difference."""

    schedulers: ClassVar = {
        # Both schedulers get the shift of training, so that they visit the noise levels as densely as it did.
        "euler": lambda config: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.shift),
        "dpm": lambda config: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
        ),
    }

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform `u` [B] to timesteps by the inverse of their distribution function, fp32 [B] in [0, 1].

        `logit_normal` (Esser et al. 2024, equation 19): logit(t) ~ N(mean, std); then the resolution shift
        (their equation 23).
        """
        # From uniform numbers and not from `randn`: each sample's `u` is part of the resumable data.
        config, t = self.config, u.float()
        if config.timesteps == "logit_normal":
            t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(t))
        return config.shift * t / (1.0 + (config.shift - 1.0) * t)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clean latents with noise; the target is the velocity (Liu et al. 2022, equation 1)."""
        clean, noise = clean.float(), noise.float()
        # In fp32: neighboring timesteps near 1 would be the same number in bf16.
        mix = self.per_position(timesteps.float(), clean)
        return (1.0 - mix) * clean + mix * noise, noise - clean
