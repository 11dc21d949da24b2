"""Clips as files: animated WebP, and an mp4 beside it if PyAV is installed; and grids that move."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.clips.media import encode_clip
from data_prep.dataset.schema import Bucket
from data_prep.images.images import ImageError, fit_bucket
from model.common.errors import UserError
from model.common.files import write_atomic
from model.encoders.latent_spaces import LatentSpace, normalize_latents
from pipeline.inference.images import make_grid

MP4_CRF = 18
"""Constant rate factor of mp4 files, which looks like the original."""
STRIP = 4
"""Frames of a clip on a contact sheet."""


def to_clips(pixels: Tensor) -> list[np.ndarray]:
    """Return pixels [B, 3, T, H, W] in [-1, 1] as clips, each uint8 [T, H, W, 3]."""
    values = ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte()
    return list(values.permute(0, 2, 3, 4, 1).cpu().numpy())


def save_clip(clip: np.ndarray, path: Path, settings: dict[str, Any]) -> None:
    """Write a clip as animated WebP without loss, and as mp4 if PyAV is installed and the sides are even.

    Args:
        clip: uint8 [T, H, W, 3].
        path: of the WebP.
        settings: of the clip, of which `fps` is read.
    """
    fps = float(settings["fps"])
    write_atomic(path, encode_clip(clip, fps, "webp"))
    # the chroma that every player shows has half the sides
    even = not (clip.shape[1] % 2 or clip.shape[2] % 2)
    if find_spec("av") is not None and even:
        write_atomic(path.with_suffix(".mp4"), encode_clip(clip, fps, "mp4", MP4_CRF, "yuv420p"))


def read_first_frame(path: Path, height: int, width: int, space: LatentSpace) -> Tensor:
    """Return an image as the normalized latents [1, C, 1, h, w] of a clip's first frame, cropped to its
    aspect.

    Raises:
        UserError: if it is not an image.
    """
    try:
        image, _ = fit_bucket(path.read_bytes(), Bucket(height, width))
    except (OSError, ImageError) as error:
        raise UserError(f"--first-frame {path}: {error}") from error
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1.0
    mean, _ = space.encode(pixels[None, :, None])  # [1, C, 1, h, w]
    return normalize_latents(mean, space.statistics)


def make_strip(clip: np.ndarray) -> Image.Image:
    """Return some frames of a clip uint8 [T, H, W, 3] side by side, the first and the last among them."""
    numbers = np.linspace(0, len(clip) - 1, min(STRIP, len(clip))).round().astype(int)
    return Image.fromarray(np.concatenate(list(clip[numbers]), axis=1))


def make_contact_sheet(clips: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Lay out some frames of each clip, with its caption below."""
    return make_grid([make_strip(clip) for clip in clips], captions)


def make_moving_grid(clips: Sequence[np.ndarray], captions: Sequence[str], fps: float) -> bytes:
    """Lay out clips of one length like images, each with its caption below, as an animated WebP.

    Args:
        clips: uint8 [T, H, W, 3] each.
        captions: one per clip.
        fps: frames per second.
    """
    frames = []
    for number in range(len(clips[0])):
        images = [Image.fromarray(clip[number]) for clip in clips]
        frames.append(np.asarray(make_grid(images, captions)))
    return encode_clip(np.stack(frames), fps, "webp")
