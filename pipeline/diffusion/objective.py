"""What the network learns: rectified flow's velocity, or the paper's DDPM epsilon (appendix A.1)."""

import functools

import torch
from torch import Tensor

from pipeline.stage.config import ObjectiveConfig

DDPM_STEPS = 1000
DDPM_BETAS = (0.00085, 0.012)
"""Ends of the "scaled linear" schedule of latent diffusion (Rombach et al. 2022); the paper names no schedule."""


@functools.cache
def ddpm_alphas() -> Tensor:
    """Share of signal variance left after each of the DDPM steps, fp32 [1000]: the cumulative product of 1 - beta.

    Computed as diffusers' schedulers do, so that training and sampling agree to the bit.
    """
    first, last = DDPM_BETAS
    betas = torch.linspace(first**0.5, last**0.5, DDPM_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def flow_times(config: ObjectiveConfig, u: Tensor) -> Tensor:
    """Map uniform `u` [B] to times of the flow by the inverse of their distribution function, fp32 [B] in [0, 1].

    `logit_normal` (Esser et al. 2024, equation 19): logit(t) ~ N(mean, std); then the resolution shift (their equation 23).
    """
    t = u.float()
    if config.timesteps == "logit_normal":
        t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(t))
    return config.shift * t / (1.0 + (config.shift - 1.0) * t)


def draw_times(config: ObjectiveConfig, u: Tensor) -> Tensor:
    """Times fp32 [B] in [0, 1] that `u` [B], uniform in [0, 1), picks: 1 is pure noise for `flow`, step / 1000 for `ddpm`."""
    if config.name == "flow":
        return flow_times(config, u)
    return (u.double() * DDPM_STEPS).long().clamp(0, DDPM_STEPS - 1).float() / DDPM_STEPS


def corrupt(config: ObjectiveConfig, clean: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix `clean` latents [B, C, h, w] with `noise` at the times that `u` [B], uniform in [0, 1), picks.

    Returns:
        The noisy latents [B, C, h, w]; the times fp32 [B] in [0, 1], where 1 is pure noise for `flow` and step / 1000
        for `ddpm`; and what the network has to predict [B, C, h, w].
    """
    t = draw_times(config, u)
    noisy, target = corrupt_at(config, clean, noise, t)
    return noisy, t, target


def corrupt_at(config: ObjectiveConfig, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mix `clean` latents [B, C, h, w] with `noise` at times `t` [B] in [0, 1]; a `ddpm` time is rounded to its step.

    Returns:
        The noisy latents and what the network has to predict, both fp32 [B, C, h, w].
    """
    clean, noise = clean.float(), noise.float()
    if config.name == "flow":
        mix = t.float().view(-1, 1, 1, 1)
        # Liu et al. 2022, equation 1: a straight line from data to noise, whose velocity is their difference.
        return (1.0 - mix) * clean + mix * noise, noise - clean
    step = (t.double() * DDPM_STEPS).round().long().clamp(0, DDPM_STEPS - 1)
    alpha = ddpm_alphas().to(clean.device)[step].view(-1, 1, 1, 1)
    # Ho et al. 2020, equation 4.
    return alpha.sqrt() * clean + (1.0 - alpha).sqrt() * noise, noise


def loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
