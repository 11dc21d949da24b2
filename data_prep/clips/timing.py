"""The frames of a clip: which ones of a video, by the times at which they are shown. Integers only.

A video has a frame interval: the mean of the gaps between frames that are within a quarter of their median.
So frames that were left out or held, as in screen recordings, do not change it, nor do times that a container
rounds to milliseconds. In this interval, a clip takes every `stride`-th time, and of each time the frame that
is shown then. A clip of a constant frame rate is every `stride`-th frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from data_prep.images.images import ImageError

Start = Literal["middle", "start", "random"]
BAD_TIMES = "clip: absurd times"
MAX_HELD = 64
"""A video may last this many times as long as its frames do at its frame interval; longer ones have absurd
times, such as a last frame that is shown for a year."""
MAX_SECONDS = 1000
"""Longest frame interval. Slide shows have longer ones, and no motion."""
MIN_SECONDS = Fraction(1, 1000)
"""Shortest frame interval."""


@dataclass(frozen=True)
class Timeline:
    """The times of a video's frames."""

    times: np.ndarray
    """Time at which each frame is shown first, in units, int64 [N], ascending."""
    end: int
    """Time at which the last frame is no longer shown."""
    unit: Fraction
    """Seconds of a unit."""
    interval: Fraction
    """Units of the frame interval."""

    @classmethod
    def of(cls, times: Sequence[int] | np.ndarray, last: int, unit: Fraction, steps: int = 0) -> "Timeline":
        """Return the timeline of some frames.

        Args:
            times: times of the frames in any order; equal ones count once.
            last: duration of the last frame; 0 = a frame interval.
            unit: seconds of a unit of both.
            steps: number of frame intervals, if it is known; 0 = it follows from the times.

        Raises:
            ImageError: if they are absurd.
        """
        ordered = np.unique(np.asarray(times, np.int64))
        # Far smaller than int64, so that no sum or product below overflows it.
        if len(ordered) and max(abs(int(ordered[0])), abs(int(ordered[-1])), abs(last)) >= 1 << 60:
            raise ImageError(BAD_TIMES, "times beyond 60 bits")

        # A single frame has no interval; any one makes a clip of one frame.
        gaps, last = (np.diff(ordered), last) if len(ordered) > 1 else (np.array([round(1 / unit)]), 0)

        median = int(np.median(gaps))
        usual = gaps[(4 * gaps >= 3 * median) & (4 * gaps <= 5 * median)]
        interval = Fraction(int(usual.sum()), len(usual)) if len(usual) else Fraction(median)
        if steps:
            interval = Fraction(int(ordered[-1]) + last - int(ordered[0]), steps)
        if not MIN_SECONDS <= interval * unit <= MAX_SECONDS:
            raise ImageError(BAD_TIMES, f"{float(interval * unit):.3g} seconds per frame")

        end = int(ordered[-1]) + (last or round(interval)) if len(ordered) else 0
        timeline = cls(ordered, end, unit, interval)
        if timeline.steps > MAX_HELD * max(1, len(ordered)):
            raise ImageError(BAD_TIMES, f"{len(ordered)} frames in {float(end * unit):.3g} seconds")
        return timeline

    @property
    def steps(self) -> int:
        """Number of frame intervals."""
        return round((self.end - int(self.times[0])) / self.interval) if len(self.times) else 0

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(1 / (self.interval * self.unit))

    def stride(self, fps: float) -> int:
        """Return the stride that comes nearest to a number of frames per second; at least 1."""
        return max(1, int(self.fps / fps + 0.5))

    def usable(self, fps: float) -> int:
        """Return the number of frames of the longest clip at about `fps`."""
        return (self.steps - 1) // self.stride(fps) + 1 if self.steps else 0

    def choose(self, frames: int, fps: float, start: Start, key: Sequence[int]) -> "Choice":
        """Choose a clip.

        Args:
            frames: number of its frames, at most `usable(fps)`.
            fps: wanted frames per second.
            start: where it starts: so that its middle is the video's, at the start, or at random.
            key: key of the random start.

        Raises:
            ValueError: if the video is too short.
        """

        stride = self.stride(fps)
        free = self.steps - 1 - (frames - 1) * stride
        if free < 0:
            raise ValueError(f"{frames} frames of {self.usable(fps)}")

        first = {
            "start": lambda: 0,
            "middle": lambda: free // 2,
            "random": lambda: int(np.random.default_rng([*key]).integers(free + 1)),
        }[start]()

        # Half an interval later than the time itself, since a container may have rounded it.
        origin = int(self.times[0])
        halves = [2 * (first + stride * number) + 1 for number in range(frames)]
        shown = [origin + int(half * self.interval / 2) for half in halves]

        indices = np.searchsorted(self.times, shown, side="right") - 1
        seconds = float(first * self.interval * self.unit)
        return Choice(tuple(indices.tolist()), self.fps / stride, stride, seconds)


@dataclass(frozen=True)
class Choice:
    """The frames of a clip."""

    indices: tuple[int, ...]
    """Places in the timeline, ascending; a frame that is held occurs several times."""
    fps: float
    stride: int
    """Frame intervals from one frame to the next."""
    start: float
    """Seconds from the video's first frame to the clip's."""
