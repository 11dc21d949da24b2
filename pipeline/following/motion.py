"""Read moving scenes in a clip, and score how well it follows its caption: exact, and without a network.

Objects of a moving scene have different colors, so a color is tracked over the frames: its largest region in
each. A line through its centers gives direction and speed, one through the logarithm of its side growth. The
other attributes are read in the first, middle and last frame, and the majority counts.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_prep.scenes.grammar import Shape
from data_prep.scenes.moving import DIRECTIONS, RATIOS, SHIFTS, Motion, MovingCaption, Speed
from pipeline.following.reading import Blob, DetectedObject, read_blobs, read_scene
from pipeline.following.scoring import Claim, SceneScores, assign_objects, score_all, score_others

T = TypeVar("T")
MIN_PRESENT = 0.5
"""An object is in at least this share of the frames."""
MIN_STRENGTH = 0.5
"""Motion below this share of the slow one is none."""
FAST_SHIFT = math.sqrt(SHIFTS["slow"] * SHIFTS["fast"])
FAST_GROWTH = math.sqrt(math.log(RATIOS["slow"]) * math.log(RATIOS["fast"]))
"""Way in scene units, and logarithm of the growth, from which motion is fast."""


@dataclass(frozen=True)
class DetectedMotion:
    """One object as it is recognized in a clip."""

    item: DetectedObject
    """Its attributes; the center is that of the middle frame."""
    motion: Motion
    speed: Speed | None
    """None if it is still."""


def read_moving_scene(clip: np.ndarray, scale: float = 1.0) -> list[DetectedMotion]:
    """Return the objects of a clip, with their motion.

    Args:
        clip: uint8 [T, H, W, 3].
        scale: size of the objects, as `MovingScene.scale`.
    """
    tracks: dict[str, dict[int, Blob]] = defaultdict(dict)
    for time, frame in enumerate(clip):
        # In ascending order, so that the largest of a color stays.
        for blob in sorted(read_blobs(frame, scale), key=lambda blob: blob.side):
            tracks[blob.colour][time] = blob

    looks: dict[str, list[DetectedObject]] = defaultdict(list)
    for time in sorted({0, len(clip) // 2, len(clip) - 1}):
        for item in read_scene(clip[time], scale):
            looks[item.colour].append(item)

    detected = []
    for color, track in sorted(tracks.items()):
        if len(track) >= MIN_PRESENT * len(clip) and looks[color]:
            motion, speed = _motion_of(track, len(clip))
            detected.append(DetectedMotion(_majority(looks[color]), motion, speed))

    return detected


def _motion_of(track: dict[int, Blob], frames: int) -> tuple[Motion, Speed | None]:
    """Return motion and speed of a track: blobs by their frame, of a clip of `frames`."""
    if len(track) < 2:
        return "still", None
    times = np.array(list(track)) / (frames - 1)
    values = np.array([[blob.x, blob.y, math.log(blob.side)] for blob in track.values()])

    # Slopes over the whole clip, [3].
    right, down, growth = np.polyfit(times, values, 1)[0].tolist()

    # The stronger of the two, in units of the slow one, is the motion.
    shift = math.hypot(right, down)
    shift_strength, growth_strength = shift / SHIFTS["slow"], abs(growth) / math.log(RATIOS["slow"])
    if max(shift_strength, growth_strength) < MIN_STRENGTH:
        return "still", None
    if growth_strength > shift_strength:
        return "growing" if growth > 0 else "shrinking", "fast" if abs(growth) > FAST_GROWTH else "slow"

    motion = max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * right + DIRECTIONS[name][1] * down)

    return motion, "fast" if shift > FAST_SHIFT else "slow"


def _majority(items: Sequence[DetectedObject]) -> DetectedObject:
    """Return the object that most frames show, attribute by attribute; the first frame counts in a tie."""
    middle = items[len(items) // 2]
    shapes: list[Shape] = [item.shape for item in items if item.shape is not None]
    return DetectedObject(
        middle.colour,
        _most_common(shapes) if shapes else None,
        _most_common([item.size for item in items]),
        _most_common([item.texture for item in items]),
        middle.x,
        middle.y,
    )


def _most_common(values: Sequence[T]) -> T:
    """Return the value that occurs most often; of several, the first one."""
    return Counter(values).most_common(1)[0][0]


def score_clips(
    detected: Sequence[Sequence[DetectedMotion]], captions: Sequence[MovingCaption]
) -> SceneScores:
    """Judge each caption against the objects that were detected in its clip.

    The claims are those of images (color, shape, size, texture), `motion` and `speed`.

    Raises:
        ValueError: if the numbers of clips and captions differ.
    """
    return score_all(judge_clip, detected, captions)


def judge_clip(clip: int, objects: Sequence[DetectedMotion], caption: MovingCaption) -> list[Claim]:
    """Return all claims of one caption, judged against the objects of its clip.

    Args:
        clip: index that the claims carry.
        objects: the objects detected in the clip.
        caption: the caption.
    """
    segments = [moving.segment for moving in caption.segments]
    assigned = assign_objects([found.item for found in objects], segments)

    claims = []
    for position, (moving, numbers) in enumerate(zip(caption.segments, assigned, strict=True)):
        # Every segment has one object; without it, all of its claims are wrong.
        found = objects[numbers[0]] if numbers else None
        judged = {
            name: found is not None and getattr(found.item, name) == value
            for name, value in moving.segment.stated.items()
        }

        judged["motion"] = found is not None and found.motion == moving.motion
        if moving.speed is not None:
            judged["speed"] = judged["motion"] and found is not None and found.speed == moving.speed
        for name, correct in judged.items():
            claims.append(Claim(clip, name, position, len(segments), correct))

    return claims


def motion_chance(
    detected: Sequence[Sequence[DetectedMotion]], captions: Sequence[MovingCaption], shifts: int = 16
) -> dict[str, float]:
    """Return `SceneScores.summary` of clips against other clips' captions, that is, the chance level.

    Args:
        detected: the objects of each clip.
        captions: their captions.
        shifts: each caption is compared with the clips of this many captions that follow it.
    """
    return score_others(judge_clip, detected, captions, shifts)
