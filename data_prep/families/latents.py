"""Latents families: the pairs' images through the VAE, kept as posterior moments."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.config import DatasetConfig, LatentsConfig
from data_prep.dataset.parts import Share, register_family
from data_prep.dataset.schema import Family
from data_prep.families.encode import encode_family
from data_prep.images.images import decode_image
from data_prep.pairs.pairs import Pair
from data_prep.store.store import Store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.encoders.vae import VAE, normalize


def latents_family(latents: LatentsConfig, vae: VAE) -> Family:
    """The family that `vae` writes; where the VAE lies is information, not identity."""
    info = {
        "channels": vae.channels,
        "downsampling": vae.downsampling,
        "scaling_factor": vae.scaling,
        "shift_factor": vae.shift,
        "vae": latents.vae,
        "revision": latents.revision,
    }
    return Family(latents.name, "latents", {**vae.identity, "moments": "bf16"}, info)


def run_latents(config: DatasetConfig, latents: LatentsConfig, dataset: Store, share: Share) -> None:
    """Encode the missing parts of this share.

    Raises:
        UserError: no such VAE, or a family of this name was made with another one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = VAE.load(latents.vae, latents.revision, device)
    family = register_family(dataset, latents_family(latents, vae), None)
    with Workers(decode_images, None, _lost, config.workers) as decoders:

        def encode_part(pairs: list[Pair]) -> tuple[list[dict[str, Any]], dict[str, float]]:
            return encode_pairs(vae, pairs, latents.batch, decoders)

        encode_family(dataset, family, encode_part, share)


def decode_images(_: None, images: Sequence[bytes]) -> list[np.ndarray]:
    """Decode images, each uint8 [H, W, 3]; runs in a worker process."""
    return [np.asarray(decode_image(data)) for data in images]


def _lost(image: bytes) -> np.ndarray:
    raise RuntimeError(f"an image of {len(image):,} bytes, decoded before, kills the process that decodes it")


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Scale uint8 [B, H, W, 3] to what the VAE reads: fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def encode_pairs(
    vae: VAE, pairs: list[Pair], batch: int, decoders: Workers[None, bytes, np.ndarray]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of one part in `LATENT_COLUMNS`, and the mean and spread of its normalised latents.

    Raises:
        UserError: the images' sides are not multiples of the VAE's downsampling.
        ValueError: an image has another size than its bucket, or the VAE returned a value that is not finite.
    """
    rows: list[dict[str, Any]] = []
    total = square = values = 0.0
    chunks = ([pair.image for pair in pairs[start : start + batch]] for start in range(0, len(pairs), batch))
    for _, decoded in decoders.map(chunks):
        images = np.stack(decoded)  # [B, H, W, 3]
        chunk = pairs[len(rows) : len(rows) + len(images)]
        size = (chunk[0].height, chunk[0].width)
        if images.shape[1:3] != size:
            raise ValueError(f"images of {images.shape[1:3]} in a bucket of {size}, near sample {chunk[0].key}")
        if any(side % vae.downsampling for side in size):
            raise UserError(f"bucket {size[0]}x{size[1]}: set buckets.step to a multiple of the VAE's {vae.downsampling}")
        mean, std = vae.encode(to_pixels(images, vae.module.device))  # [B, C, h, w] each
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(f"the VAE's moments are not finite near sample {chunk[0].key}")
        latents = normalize(mean, std, torch.zeros_like(std), vae.scaling, vae.shift).double()
        total, square, values = total + latents.sum().item(), square + latents.square().sum().item(), values + latents.numel()
        packed = [moments_bytes(moments) for moments in (mean, std)]
        rows += [{"id": pair.id, "mean": m, "std": s} for pair, m, s in zip(chunk, *packed, strict=True)]
    average = total / max(values, 1)
    return rows, {"latent_mean": average, "latent_std": (square / max(values, 1) - average**2) ** 0.5}


def moments_bytes(moments: Tensor) -> list[bytes]:
    """Each sample's moments [C, h, w] as bf16 bytes."""
    return [sample.tobytes() for sample in moments.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()]
