"""Rectified flow: the network predicts the velocity (Liu et al. 2022)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.diffusion.first_frame import first_frame_levels
from pipeline.diffusion.objective import OBJECTIVES, Objective, SampleNormal, TrainingExample
from pipeline.diffusion.patch_times import make_levels, sample_places, times_of_levels
from pipeline.stage.objective import ObjectiveConfig


# Both schedulers get the shift of training, so that they visit the noise levels as densely as it did.
# diffusers is imported where an image is sampled: it takes seconds, which a training rank need not wait for.
def _euler(config: ObjectiveConfig) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.shift)


def _dpm(config: ObjectiveConfig) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
    )


@OBJECTIVES.register("flow")
class Flow(Objective):
    """Straight lines from data (t = 0) to noise (t = 1); the velocity is their difference."""

    patch_times = True
    schedulers: ClassVar = {"euler": _euler, "dpm": _dpm}

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Map uniform `u` [B] to timesteps by the inverse of their distribution function, fp32 [B] in [0, 1].

        `logit_normal` (Esser et al. 2024, equation 19): logit(t) ~ N(mean, std); then the resolution shift
        (their equation 23).
        """
        return self._shifted(self._unshifted(u))

    def _unshifted(self, u: Tensor) -> Tensor:
        # From uniform numbers and not from `randn`: each sample's `u` is part of the resumable data.
        config, t = self.config, u.float()
        if config.timesteps == "logit_normal":
            t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(t))
        return t

    def _shifted(self, t: Tensor) -> Tensor:
        return self.config.shift * t / (1.0 + (self.config.shift - 1.0) * t)

    def training_example(
        self, clean: Tensor, noise: Tensor, u: Tensor, normal: SampleNormal
    ) -> TrainingExample:
        """Make a batch of training examples, each with the times that `objective.patch_times` asks for."""
        if self.config.shift_positions is not None:
            own = self.config.at_size(math.prod(clean.shape[2:]))
            return Flow(own, self.patch).training_example(clean, noise, u, normal)

        if self.config.first_frame:
            return self._with_first_frames(clean, noise, u, normal)
        levels = self.config.time_levels
        if levels == 1:
            return super().training_example(clean, noise, u, normal)

        times = self._shifted(times_of_levels(self._unshifted(u), levels))  # [B, K]
        patches = math.prod(clean.shape[2:]) // math.prod(self.patch)
        places = sample_places(normal, patches, levels)  # [B, N]
        noisy, target = self.add_noise(clean, noise, times.gather(1, places))
        return TrainingExample(noisy, times, target, make_levels(self.config.patch_times, times, places))

    def _with_first_frames(
        self, clean: Tensor, noise: Tensor, u: Tensor, normal: SampleNormal
    ) -> TrainingExample:
        """Make a batch of training examples, in some of which the first frame is given."""
        times = self.sample_timesteps(u)
        noisy, target = self.add_noise(clean, noise, times)
        grid = [size // side for size, side in zip(clean.shape[2:], self.patch, strict=True)]
        given = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)

        if len(grid) == 3 and grid[0] > 1:
            given = torch.special.ndtr(normal("first_frame", (1,)))[:, 0] < self.config.first_frame
            # A given frame has no noise, and does not move: its velocity is 0.
            kept = given.view(-1, 1, 1, 1, 1)
            noisy[:, :, :1] = torch.where(kept, clean[:, :, :1].float(), noisy[:, :, :1])
            target[:, :, :1] = target[:, :, :1].masked_fill(kept, 0.0)

        frames = grid if len(grid) == 3 else [1, *grid]
        of_levels, levels = first_frame_levels(given, times, frames)
        return TrainingExample(noisy, of_levels, target, levels)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clean latents with noise; the target is the velocity (Liu et al. 2022, equation 1)."""
        clean, noise = clean.float(), noise.float()
        # In fp32: neighboring timesteps near 1 would be the same number in bf16.
        mix = self.per_position(timesteps.float(), clean)
        return (1.0 - mix) * clean + mix * noise, noise - clean
