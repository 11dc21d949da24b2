"""Clips of videos and animations: their size and length for the plan, and their pixels for the pairs."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from data_prep.clips.animation import is_animation, open_animation
from data_prep.clips.large_file import LargeFile, Media
from data_prep.clips.timing import Choice, Start, Timeline
from data_prep.clips.video import is_video, open_video
from data_prep.dataset.schema import Bucket
from data_prep.images.images import Crop, ImageError

TOO_STILL = "clip: too still"
CUT = "clip: has a cut"
MOTION_SIDE = 64
"""Shorter side, in pixels, to which frames are reduced before they are compared."""


class ClipSettings(Protocol):
    """The fields of `ClipsConfig` that choose and judge clips."""

    frames: list[int]
    fps: float
    start: Start
    min_motion: float
    max_jump: float


class ClipFile(Protocol):
    """An opened video or animation."""

    timeline: Timeline

    @property
    def height(self) -> int:
        """Height of the upright frames."""
        ...

    @property
    def width(self) -> int:
        """Width of the upright frames, in square pixels."""
        ...

    def read(self, indices: Sequence[int], bucket: Bucket) -> tuple[np.ndarray, Crop]:
        """Return frames of the bucket's size, uint8 [T, H, W, 3], and the crop in pixels of the original.

        Args:
            indices: places in the timeline, ascending; a place may occur several times.
            bucket: height and width.

        Raises:
            ImageError: if a frame cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class ClipFacts:
    """Size and length of a video, for the plan."""

    height: int
    width: int
    frames: int
    """Frames of the longest clip at about the wanted rate."""
    fps: float
    """Rate of that clip."""
    ends: tuple[np.ndarray, ...] = ()
    """First, middle and last frame of the clip that will be taken, uint8 [H, W, 3], if asked for."""


@dataclass(frozen=True)
class FittedClip:
    """A clip of a bucket's size."""

    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    crop: Crop
    choice: Choice
    motion: float
    """Mean absolute difference of neighboring frames, in levels of luma at `MOTION_SIDE` pixels."""
    jump: float
    """Largest difference of two neighboring frames, likewise."""


def is_clip(data: Media) -> bool:
    """True if a file is a video, or an animation with several frames."""
    return isinstance(data, LargeFile) or is_video(data) or is_animation(data)


def open_clip(data: Media) -> AbstractContextManager[ClipFile]:
    """Open a video or an animation.

    Raises:
        ImageError: if it is damaged, too large, or none that is read.
    """
    if isinstance(data, LargeFile) or is_video(data):
        return open_video(data)
    return open_animation(data)


def probe_clip(data: Media, settings: ClipSettings, key: Sequence[int], ends_side: int = 0) -> ClipFacts:
    """Return size and length of a video; only what says so is decoded.

    Args:
        data: the file.
        settings: which clip of it will be taken.
        key: key of a random start.
        ends_side: shorter side of the clip's first, middle and last frame to return; 0 = none.

    Raises:
        ImageError: if the file cannot be used.
    """
    with open_clip(data) as clip:
        timeline = clip.timeline
        usable = timeline.usable(settings.fps)
        fps = timeline.fps / timeline.stride(settings.fps)
        frames = longest(settings.frames, usable)
        if not ends_side or not frames:
            return ClipFacts(clip.height, clip.width, usable, fps)

        indices = timeline.choose(frames, settings.fps, settings.start, key).indices

        # The whole frame, of about the file's aspect: a near duplicate may have other borders.
        scale = ends_side / min(clip.height, clip.width)
        size = Bucket(max(1, round(clip.height * scale)), max(1, round(clip.width * scale)))
        ends, _ = clip.read([indices[0], indices[frames // 2], indices[-1]], size)
        return ClipFacts(clip.height, clip.width, usable, fps, tuple(ends))


def fit_clip(data: Media, bucket: Bucket, settings: ClipSettings, key: Sequence[int]) -> FittedClip:
    """Choose, decode, resize and crop the clip of a file, and judge its motion.

    Args:
        data: the file.
        bucket: number of frames and size.
        settings: rate, start, and bounds of motion.
        key: key of a random start.

    Raises:
        ImageError: if the file cannot be used, or its clip is too still or has a cut.
    """
    with open_clip(data) as clip:
        choice = clip.timeline.choose(bucket.frames, settings.fps, settings.start, key)
        frames, crop = clip.read(choice.indices, bucket)

    motion, jump = measure_motion(frames)
    if motion < settings.min_motion:
        raise ImageError(TOO_STILL, f"motion of {motion:.2f} levels")
    if jump > settings.max_jump:
        raise ImageError(CUT, f"{jump:.1f} levels between two frames")
    return FittedClip(frames, crop, choice, motion, jump)


def first_frame(data: Media, side: int) -> Image.Image:
    """Return the first frame of a video or animation, with a shorter side of at most `side` pixels.

    Raises:
        ImageError: if the file cannot be used.
        UserError: if it is a video and PyAV is not installed.
    """
    with open_clip(data) as clip:
        scale = min(1.0, side / min(clip.height, clip.width))
        size = Bucket(max(1, round(clip.height * scale)), max(1, round(clip.width * scale)))
        return Image.fromarray(clip.read([0], size)[0][0])


def longest(choices: Sequence[int], usable: int) -> int:
    """Return the largest number of frames that is usable; 0 if there is none."""
    return max((frames for frames in choices if frames <= usable), default=0)


def measure_motion(frames: np.ndarray) -> tuple[float, float]:
    """Return mean and largest difference of neighboring frames, in levels of luma (of 255).

    Args:
        frames: uint8 [T, H, W, 3].
    """

    factor = max(1, min(frames.shape[1:3]) // MOTION_SIDE)
    small = [np.asarray(Image.fromarray(frame).reduce(factor).convert("L"), np.int16) for frame in frames]
    changes = [float(np.abs(after - before).mean()) for before, after in itertools.pairwise(small)]
    return (sum(changes) / len(changes), max(changes)) if changes else (0.0, 0.0)
