"""Latents families: the pairs' images or clips in a latent space, stored as mean and std of each latent."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.config import DatasetConfig, LatentsConfig
from data_prep.dataset.parts import register_family
from data_prep.dataset.schema import MEAN_ALONE, Bucket, Family
from data_prep.families.encode import EncodedRows, Encoder, encode_parts
from data_prep.pairs.pairs import Pair, read_clip
from data_prep.store.store import Store
from data_prep.workers import Workers
from model.common.errors import UserError
from model.common.share import Share
from model.encoders.latent_spaces import (
    AUTOENCODER_KL,
    LatentSpace,
    downsampling_per_axis,
    latent_frames,
    load_latent_space,
    normalize_latents,
)

MAX_BF16_ERROR = 0.03
"""Error of a VAE in bf16 above which it is refused. Storing the latents in bf16 is an error of 0.1 to
0.2 %."""


def latents_family(latents: LatentsConfig, space: LatentSpace) -> Family:
    """Return the family that `space` writes; where the space was loaded from is information, not identity."""
    identity = {**space.identity, "moments": MEAN_ALONE if latents.moments == "mean" else "bf16"}
    if (
        space.name != AUTOENCODER_KL
    ):  # families of it were written before there were others: their hash must stay
        identity["space"] = space.name

    downsampling = space.downsampling
    info = {
        "channels": space.channels,
        "downsampling": downsampling if isinstance(downsampling, int) else list(downsampling),
        **space.statistics,
        "vae": latents.vae,
        "revision": latents.revision,
    }
    return Family(latents.name, "latents", identity, info)


def run_latents(config: DatasetConfig, latents: LatentsConfig, dataset: Store, share: Share) -> None:
    """Encode the missing parts of this share.

    Raises:
        UserError: if there is no such latent space, or a family of this name was made with another one.
    """
    encode_parts(dataset, latents.name, partial(open_latents, config, latents, dataset), share)


@contextmanager
def open_latents(config: DatasetConfig, latents: LatentsConfig, dataset: Store) -> Iterator[Encoder]:
    """Load the latent space, and register the family.

    Raises:
        UserError: if there is no such latent space, or a family of this name was made with another one.
    """
    space, exact = _load_space(latents), None
    if latents.dtype == "bf16":
        exact = _load_space(latents)
        space.encode_in_bf16()
    family = register_family(dataset, latents_family(latents, space), None)

    # Decoding in this process would keep the GPU waiting.
    decode = decode_clips if space.encodes_clips else decode_images
    with Workers(decode, None, _lost, config.workers) as decoders:

        def encode_part(pairs: list[Pair]) -> EncodedRows:
            nonlocal exact
            if exact is not None:
                images = np.stack(decode(None, pairs[: latents.batch]))
                check_bf16(space, exact, to_pixels(images, space.device), latents.name)
                exact = None  # one part shows the error, and a GPU's memory is dear
            rows, counts = encode_pairs(space, pairs, latents.batch, decoders)
            return (rows, counts) if latents.moments == "mean_std" else means_alone(rows, counts)

        yield family, encode_part


def _load_space(latents: LatentsConfig) -> LatentSpace:
    """Load the latent space in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space = load_latent_space(latents.vae, latents.revision, device, latents.space)
    if latents.tiling:
        space.tile_encoding()
    return space


def check_bf16(space: LatentSpace, exact: LatentSpace, pixels: Tensor, name: str) -> None:
    """Print how far the latents of a space in bf16 are from those of the same space in fp32.

    The error is the root mean square of the difference, as a share of the latents' std.

    Args:
        space: computes in bf16.
        exact: computes in fp32.
        pixels: [B, 3, H, W] in [-1, 1], or [B, 3, T, H, W].
        name: name of the family.

    Raises:
        UserError: if the error of the means is above `MAX_BF16_ERROR`.
    """
    mean, std = space.encode(pixels)
    exact_mean, exact_std = exact.encode(pixels)

    unit = exact_mean.std()
    errors = [
        ((value - right).square().mean().sqrt() / unit).item()
        for value, right in ((mean, exact_mean), (std, exact_std))
    ]
    print(
        f"latents family {name}: bf16 changes the means by {errors[0]:.2%} of the latents' std, the stds by "
        f"{errors[1]:.2%}"
    )
    if not errors[0] <= MAX_BF16_ERROR:
        raise UserError(
            f"latents family {name}: bf16 changes the latents by {errors[0]:.2%} of their std, more than "
            f"{MAX_BF16_ERROR:.0%}: set latents.dtype=fp32"
        )


def decode_images(_: None, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Decode the images of pairs to arrays, each uint8 [H, W, 3]; runs in a worker process."""
    # Of a clip the first frame, so that `_check_size` can say what is wrong.
    return [read_clip(pair)[0] for pair in pairs]


def decode_clips(_: None, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Decode the clips or images of pairs to arrays, each uint8 [T, H, W, 3]; runs in a worker process."""
    return [read_clip(pair) for pair in pairs]


def _lost(pair: Pair) -> np.ndarray:
    raise RuntimeError(
        f"an image of {len(pair.image):,} bytes, decoded before, kills the process that decodes it"
    )


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Scale uint8 [B, H, W, 3] to fp32 [B, 3, H, W] in [-1, 1], or [B, T, H, W, 3] to [B, 3, T, H, W], as a
    latent space reads it."""
    # Sent to the device as bytes, a quarter of fp32.
    return torch.from_numpy(images).to(device).movedim(-1, 1).float() / 127.5 - 1.0


def encode_pairs(
    space: LatentSpace, pairs: list[Pair], batch: int, decoders: Workers[None, Pair, np.ndarray]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Encode the pairs of one part.

    Args:
        space: the latent space.
        pairs: with images or clips of one bucket.
        batch: pairs to encode at once.
        decoders: decode the images or clips.

    Returns:
        A row of `LATENT_COLUMNS` per pair, and the mean and std of all normalized latents.

    Raises:
        UserError: if the sides of the images are not multiples of the space's downsampling, or it cannot
            encode clips of this length.
        ValueError: if an image has another size than its bucket, or a latent is not finite.
    """
    rows: list[dict[str, Any]] = []
    total = square = count = 0.0
    for _, decoded in decoders.map(_chunks(pairs, batch)):
        images = np.stack(decoded)  # [B, H, W, 3] or [B, T, H, W, 3]
        chunk = pairs[len(rows) : len(rows) + len(images)]
        _check_size(space, images, chunk[0])

        mean, std = space.encode(to_pixels(images, space.device))  # [B, C, h, w] or [B, C, t, h, w] each
        # Stored, such a value would only be noticed as a NaN loss in some later training run.
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(f"the VAE's moments are not finite near sample {chunk[0].key}")

        # fp64, since squares of a whole part are summed
        latents = normalize_latents(mean, space.statistics).double()
        total += latents.sum().item()
        square += latents.square().sum().item()
        count += latents.numel()

        columns = zip(chunk, _to_bytes(mean), _to_bytes(std), strict=True)
        rows += [
            {"id": pair.id, "mean": mean_bytes, "std": std_bytes} for pair, mean_bytes, std_bytes in columns
        ]

    # Normalized latents should have mean 0 and std 1; anything far from that points to wrong statistics.
    average = total / max(count, 1)
    return rows, {"latent_mean": average, "latent_std": (square / max(count, 1) - average**2) ** 0.5}


def means_alone(
    rows: list[dict[str, Any]], counts: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Leave the stds out of a part, and count what that costs.

    Args:
        rows: of `LATENT_COLUMNS`.
        counts: of the part, to which is added `posterior_std`: the root mean square of the stds, as a share
            of the latents' own, which training would have added to the means as noise.
    """
    noise = total = square = values = 0.0
    for row in rows:
        mean, std = (
            torch.frombuffer(bytearray(row[name]), dtype=torch.bfloat16).double() for name in ("mean", "std")
        )
        noise += std.square().sum().item()
        total += mean.sum().item()
        square += mean.square().sum().item()
        values += mean.numel()
        del row["std"]

    variance = square - total**2 / max(values, 1)
    return rows, {**counts, "posterior_std": (noise / variance) ** 0.5 if variance > 0 else 0.0}


def _chunks(pairs: list[Pair], batch: int) -> Iterator[list[Pair]]:
    for start in range(0, len(pairs), batch):
        yield pairs[start : start + batch]


def _check_size(space: LatentSpace, images: np.ndarray, pair: Pair) -> None:
    size = pair.height, pair.width
    if pair.frames > 1 and not space.encodes_clips:
        bucket = Bucket(*size, pair.frames).name
        raise UserError(f"bucket {bucket}: the space {space.name} encodes images alone: name a VAE of clips")
    if images.shape[-3:-1] != size:
        raise ValueError(f"images of {images.shape[-3:-1]} in a bucket of {size}, near sample {pair.key}")

    if space.encodes_clips:
        time, *factors = downsampling_per_axis(space.downsampling, axes=3)
        latent_frames([time], pair.frames)
    else:
        factors = downsampling_per_axis(space.downsampling, axes=2)
    if any(side % factor for side, factor in zip(size, factors, strict=True)):
        raise UserError(
            f"bucket {pair.height}x{pair.width}: "
            f"set buckets.step to a multiple of the VAE's {space.downsampling}"
        )


def _to_bytes(moments: Tensor) -> list[bytes]:
    """Return each sample's moments [C, h, w] as bf16 bytes."""
    # NumPy has no bf16, so the bits pass through as int16.
    return [
        sample.tobytes() for sample in moments.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
    ]
