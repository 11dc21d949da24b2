"""A wavelet autoencoder with a teacher's latents: its sizes, and what it learns from the teacher."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.common.errors import UserError
from model.encoders.latent_spaces import LatentSpace, load_latent_space
from model.encoders.vae import VAE
from model.encoders.wavelet import WaveletAutoencoder, WaveletConfig
from model.functional import has_bf16

STUDENT = WaveletConfig(width=80, blocks=4, encoder_blocks=1)
"""Sizes of a wavelet autoencoder: preparation waits for the encoder, and images depend on the decoder."""


def distillation_loss(student: Any, teacher: VAE, pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Return the loss of an autoencoder with a teacher's latents: squared error of the latents, in units of
    their std; of the logarithms of their variances; and the error of images decoded from the teacher's
    latents and from its own.

    Args:
        student: a `WaveletAutoencoder`.
        teacher: whose latents it learns.
        pixels: [B, 3, H, W] in [-1, 1].
        rng: generator of the posterior's noise, on the CPU.
    """
    mean, std = teacher.encode(pixels)
    noise = torch.randn(mean.shape, generator=rng).to(mean.device)

    factor = float(teacher.statistics["scaling_factor"])
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=has_bf16(pixels.device)):
        moments = student.encode(pixels)[0]
        # no gradient through its own latents: they are to be the teacher's, not easy ones
        decoded = student.decode(torch.cat([mean + std * noise, moments.mean.detach().float()]))[0]

    of_latents = (factor * (moments.mean.float() - mean)).square().mean()
    of_variances = (moments.logvar.float() - 2.0 * std.clamp(min=1e-12).log()).square().mean()

    error = decoded.float() - torch.cat([pixels, pixels])
    color = F.avg_pool2d(error, 4).square().mean()
    return of_latents + 0.01 * of_variances + error.abs().mean() + error.square().mean() + 4.0 * color


def make_student(teacher: VAE) -> WaveletAutoencoder:
    """Return a new autoencoder for a teacher's latents.

    Raises:
        UserError: if the teacher has another downsampling.
    """
    student = replace(
        STUDENT,
        channels=teacher.channels,
        statistics=dict(teacher.statistics),
        teacher=teacher.identity,
    )
    if teacher.downsampling != 8:
        raise UserError(
            f"--teacher: it has {teacher.downsampling} pixels per position, and three levels of wavelets 8: "
            "name another teacher"
        )
    return WaveletAutoencoder(student)


def read_teacher(folder: str, device: torch.device) -> VAE:
    """Load the teacher.

    Raises:
        UserError: if the folder holds no AutoencoderKL.
    """
    space: LatentSpace = load_latent_space(folder, None, device)
    if not isinstance(space, VAE):
        raise UserError(f"--teacher {folder}: it holds a {space.name}: name the folder of an AutoencoderKL")
    return space
