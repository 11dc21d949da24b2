"""Videos, through PyAV: the only file that imports it."""

import io
from fractions import Fraction
from types import ModuleType

import numpy as np

from data_prep.images.images import DAMAGED, ImageError
from model.common.extras import require

ENCODER_PRESET = "veryfast"
MAX_STORED_BYTES = 1 << 30
"""Bytes of the pixels of a stored clip: more is no clip of ours."""
SCALING = 4 | 1 << 13 | 1 << 14 | 1 << 18
"""Flags of ffmpeg's scaler: bicubic, chroma at full resolution inside, accurate rounding. Without the last,
all colors are one level too dark."""


def pyav() -> ModuleType:
    """Import PyAV, without its messages.

    Raises:
        UserError: if it is not installed.
    """
    require("video", "av")
    import av
    import av.logging

    # ffmpeg writes a line per odd frame, which would fill the log of a large dataset.
    av.logging.set_level(None)
    return av


def is_mp4(data: bytes) -> bool:
    """True if a file starts like an mp4 or QuickTime file; AVIF and HEIC, which are images, do too."""
    return data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"mif1", b"heic", b"heix")


def encode_mp4(frames: np.ndarray, fps: float, crf: int, chroma: str) -> bytes:
    """Encode a clip as H.264; equal arguments give equal bytes.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: frames per second.
        crf: constant rate factor.
        chroma: pixel format.

    Raises:
        UserError: if PyAV is not installed.
    """
    av = pyav()
    buffer = io.BytesIO()
    # One thread: the number of threads changes the bytes. With B-frames too, x264 0.165 gives other bytes in
    # each run (40 different ones of 40), since its lookahead reads memory that it has not written.
    options = {"crf": str(crf), "preset": ENCODER_PRESET, "x264-params": "bframes=0"}
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = chroma
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1  # BT.709, studio range
        reformatter = av.video.reformatter.VideoReformatter()
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = reformatter.reformat(
                picture,
                format=chroma,
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=SCALING,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_mp4(data: bytes) -> np.ndarray:
    """Decode all frames of what `encode_mp4` wrote, uint8 [T, H, W, 3].

    Raises:
        ImageError: if the file is damaged.
        UserError: if PyAV is not installed.
    """
    av = pyav()
    frames: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            size = 3 * stream.codec_context.height * stream.codec_context.width
            reformatter = av.video.reformatter.VideoReformatter()
            for frame in container.decode(stream):
                if (len(frames) + 1) * size > MAX_STORED_BYTES:
                    raise ImageError(DAMAGED, "too many frames")
                picture = reformatter.reformat(
                    frame, format="rgb24", src_colorspace="ITU709", interpolation=SCALING, threads=1
                )
                frames.append(picture.to_ndarray())
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ImageError(DAMAGED, f"{type(error).__name__}: {error}"[:200]) from error
    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)
