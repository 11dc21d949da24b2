"""The encoded form of a clip in the pairs: animated WebP without loss, or H.264 in an mp4.

WebP is exact, and Pillow alone reads and writes it: right for tiny pixels, drawings and moving scenes.
On photographs it takes about a byte per pixel. There H.264 at 4:4:4 and a low rate factor is several times
smaller and cheaper to decode; the loss is below that of JPEG at quality 95, in which images are stored.
"""

import io
from typing import Literal

import numpy as np
from PIL import Image

from data_prep.clips.animation import MIN_MILLISECONDS, frame_count
from data_prep.clips.video import decode_mp4, encode_mp4, is_mp4
from data_prep.images.images import DAMAGED, ImageError, faults_as_image_errors

ClipFormat = Literal["mp4", "webp"]
CRF = 14
"""Constant rate factor of stored clips: PSNR of about 45 dB."""


def encode_clip(
    frames: np.ndarray, fps: float, clip_format: ClipFormat, crf: int = CRF, chroma: str = "yuv444p"
) -> bytes:
    """Encode a clip.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        clip_format: `mp4` (H.264, needs the extra `video`), or `webp` (without loss).
        crf: constant rate factor of H.264, 0 to 51; smaller is better.
        chroma: pixel format of H.264; `yuv420p`, which needs even sides, is what every player shows.

    Raises:
        UserError: if the format is mp4 and PyAV is not installed.
    """
    if clip_format == "mp4":
        return encode_mp4(frames, fps, crf, chroma)

    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=max(MIN_MILLISECONDS, round(1000 / fps)),
        lossless=True,
        xmp=frame_count(len(frames)),
        # Fixed: the plan hashes the bytes of moving scenes, and `pairs` encodes them again.
        quality=50,
        method=2,
    )
    return buffer.getvalue()


def decode_clip(data: bytes, frames: int) -> np.ndarray:
    """Decode what `encode_clip` wrote.

    Args:
        data: the file.
        frames: number of frames of the clip.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        ImageError: if the file is damaged or has another number of frames.
        UserError: if it is an mp4 and PyAV is not installed.
    """

    clip = decode_mp4(data) if is_mp4(data) else _decode_webp(data, frames)
    if len(clip) != frames:
        raise ImageError(DAMAGED, f"{len(clip)} frames instead of {frames}")
    return clip


def _decode_webp(data: bytes, frames: int) -> np.ndarray:

    images, durations = [], []
    with faults_as_image_errors(), Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            images.append(np.asarray(image.convert("RGB")))
            durations.append(image.info.get("duration", 0))

    # The encoder joins equal neighbors to one longer frame, and writes a clip of equal frames as one image.
    total = sum(durations)
    if len(images) == 1 or total <= 0:
        return np.repeat(np.stack(images), frames if len(images) == 1 else 1, axis=0)

    counts = np.rint(np.array(durations) * (frames / total)).astype(int)
    return np.repeat(np.stack(images), counts, axis=0)
