"""Animated WebP and GIF as clips, through Pillow."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from PIL import Image

from data_prep.clips.timing import Timeline
from data_prep.dataset.schema import Bucket
from data_prep.images.images import (
    Crop,
    ImageError,
    faults_as_image_errors,
    open_image,
    resize_crop,
    to_rgb,
)

TOO_LONG = "clip: too many frames"
MAX_FRAMES = 1 << 14
MAX_PIXELS = 1 << 33
"""Pixels of all frames: an animation of a few bytes can announce any number of frames of any size."""
MIN_MILLISECONDS = 11
USUAL_MILLISECONDS = 100
"""Browsers show a frame with a duration below the first for the second."""
COUNT = re.compile(rb"li-dit: (\d{1,4}) frames")


def frame_count(frames: int) -> bytes:
    """Return the XMP text in which our own animations state their number of frames.

    WebP joins equal neighbors to one longer frame, so it does not follow from the file where frames are held.
    """
    return b"li-dit: %d frames" % frames


def _counted_frames(image: Image.Image) -> int:
    """Return the number of frames that an animation states; 0 if it does not."""
    xmp = image.info.get("xmp")
    match = COUNT.fullmatch(xmp) if isinstance(xmp, bytes) else None
    return int(match[1]) if match else 0


def is_animation(data: bytes) -> bool:
    """True if a file is a WebP or GIF with several frames; one that cannot be read is not."""
    if not (data.startswith(b"GIF8") or (data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X")):
        return False
    try:
        with faults_as_image_errors(), open_image(data) as image:
            return bool(getattr(image, "is_animated", False))
    except ImageError:
        return False  # decoding it as an image gives the reason


class Animation:
    """An opened animation. Frames are read forward only."""

    def __init__(self, image: Image.Image) -> None:
        """Read the durations of all frames.

        Raises:
            ImageError: if there are too many frames, or their times are absurd.
        """
        self._image = image
        self.width, self.height = image.size
        times, now = [], 0
        for number in self._walk():
            if number >= MAX_FRAMES or (number + 1) * self.width * self.height > MAX_PIXELS:
                raise ImageError(TOO_LONG, f"more than {number} frames of {self.height}x{self.width}")
            # Pillow knows the duration of a WebP's frame only when it is decoded.
            image.load()
            duration = image.info.get("duration", 0)
            times.append(now)
            now += duration if duration >= MIN_MILLISECONDS else USUAL_MILLISECONDS

        last = now - times[-1] if times else 0
        self.timeline = Timeline.of(times, last, Fraction(1, 1000), _counted_frames(image))

    def _walk(self) -> Iterator[int]:
        """Go to each frame in turn, and yield its number."""
        number = 0
        while True:
            try:
                self._image.seek(number)
            except EOFError:
                return
            yield number
            number += 1

    def read(self, indices: Sequence[int], bucket: Bucket) -> tuple[np.ndarray, Crop]:
        """Return frames of the bucket's size, uint8 [T, H, W, 3], and the crop in pixels of the original.

        Args:
            indices: numbers of the frames, ascending; a number may occur several times.
            bucket: height and width.
        """
        wanted, frames = set(indices), {}
        crop = Crop(0, 0, self.width, self.height)

        for number in self._walk():
            if number in wanted:
                self._image.load()
                # A frame's own mode can differ from the first one's, and `to_rgb` must not keep its buffer.
                frame, crop = resize_crop(to_rgb(self._image.copy(), self._image.format), bucket)
                frames[number] = np.asarray(frame)
            if number >= indices[-1]:
                break

        return np.stack([frames[number] for number in indices]), crop


@contextmanager
def open_animation(data: bytes) -> Iterator[Animation]:
    """Open an animation.

    Raises:
        ImageError: if it is damaged or too large.
    """
    with faults_as_image_errors(), open_image(data) as image:
        yield Animation(image)
