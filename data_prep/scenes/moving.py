"""Moving scenes: objects with a stated motion, whose clip and captions follow from (seed, index).

A scene has 1 to 3 single objects of different colors and shapes. Each moves in one direction, grows, shrinks
or is still, evenly over the whole clip, whatever its number of frames; at least one is not still. Their paths
keep their distance, so no object ever covers another one.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from data_prep.scenes.captions import (
    HELD_OUT_SEED,
    adjectives_and_noun,
    capitalize,
    join_words,
    with_article,
    zh_ground,
    zh_name,
)
from data_prep.scenes.grammar import (
    ANY_STYLE,
    COLORS,
    COMBINATIONS,
    EXTENTS,
    MIN_GAP,
    PATTERNS,
    PLAIN_GROUND,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    Color,
    Ground,
    SceneStyle,
    Segment,
    Shape,
    Texture,
    plane_sides,
)
from data_prep.scenes.rendering import MARGIN, blend_object, render_ground, to_levels

Motion = Literal["left", "right", "up", "down", "growing", "shrinking", "still"]
Speed = Literal["slow", "fast"]
MovingCaptionKind = Literal["list", "sentence", "zh"]

MOTIONS: tuple[Motion, ...] = get_args(Motion)
SPEEDS: tuple[Speed, ...] = get_args(Speed)
MOVING_CAPTION_KINDS: tuple[MovingCaptionKind, ...] = get_args(MovingCaptionKind)

MAX_MOVING = 3
SHIFTS: dict[Speed, float] = {"slow": 0.12, "fast": 0.3}
"""Way of an object over the clip, in scene units: 8 and 19 pixels in 64 x 64."""
RATIOS: dict[Speed, float] = {"slow": 1.3, "fast": 1.8}
"""Factor by which an object grows or shrinks over the clip."""
PLAIN_SHIFT, PLAIN_RATIO = 0.5, 2.5
"""Way and factor of plain scenes, whose speed is never stated: as far as a clip has room for."""
MIDDLE_EXTENT = math.sqrt(EXTENTS["small"] * EXTENTS["large"])
"""Side of a growing or shrinking object in the middle of the clip; its size is not stated."""
DIRECTIONS: dict[Motion, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Signs of the way along x and y."""
RESIZING: tuple[Motion, ...] = ("growing", "shrinking")
PLACE_TRIALS = 50

_VERBS: dict[Motion, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "growing": "grows",
    "shrinking": "shrinks",
    "still": "stays still",
}
_ADVERBS: dict[Speed | None, str] = {None: "", "slow": " slowly", "fast": " quickly"}
_ZH_VERBS: dict[Motion, str] = {
    "left": "向左移动",
    "right": "向右移动",
    "up": "向上移动",
    "down": "向下移动",
    "growing": "变大",
    "shrinking": "变小",
    "still": "静止不动",
}
_ZH_ADVERBS: dict[Speed | None, str] = {None: "", "slow": "慢慢", "fast": "快速"}


@dataclass(frozen=True)
class MovingSegment:
    """The part of a caption about one object. A speed that is None is not stated."""

    segment: Segment
    motion: Motion
    speed: Speed | None


@dataclass(frozen=True)
class MovingObject:
    """One object, and where it is at the start and at the end."""

    colour: Color
    shape: Shape
    texture: Texture
    start: tuple[float, float, float]
    """Center x, y and side, in scene units."""
    end: tuple[float, float, float]

    def at(self, time: float) -> tuple[float, float, float]:
        """Return center x, y and side at a time from 0 (start) to 1 (end)."""
        x = self.start[0] + (self.end[0] - self.start[0]) * time
        y = self.start[1] + (self.end[1] - self.start[1]) * time
        return x, y, self.start[2] * (self.end[2] / self.start[2]) ** time

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of all that it covers during the clip."""
        half = max(self.start[2], self.end[2]) / 2 * MARGIN
        columns, rows = (self.start[0], self.end[0]), (self.start[1], self.end[1])
        return min(columns) - half, min(rows) - half, max(columns) + half, max(rows) + half


@dataclass(frozen=True)
class MovingScene:
    """The ground truth of one clip."""

    aspect: float
    """Width / height."""
    ground: Ground
    segments: tuple[MovingSegment, ...]
    objects: tuple[MovingObject, ...]
    """One per segment."""
    seed: int
    """Seed of the ground's pattern."""
    scale: float = 1.0
    """Size of its objects, as a multiple of `EXTENTS`."""


@dataclass(frozen=True)
class MovingCaption:
    """A caption and its claims."""

    kind: MovingCaptionKind
    text: str
    segments: tuple[MovingSegment, ...]
    """In the order in which they are mentioned."""


@dataclass(frozen=True)
class MovingPrompt:
    """A scene and its caption. A model gets the caption alone."""

    scene: MovingScene
    caption: MovingCaption


def sample_moving_scene(seed: int, index: int, aspect: float, style: SceneStyle = ANY_STYLE) -> MovingScene:
    """Return scene `index` of a seed; equal arguments give equal scenes.

    Args:
        seed: seed of the set of scenes.
        index: number of the scene.
        aspect: width / height of the clip.
        style: what all scenes of the set have in common.
    """
    # The order of the calls to `random` defines the scenes: another order would change every dataset.
    random = np.random.default_rng([seed, index])
    ground = PLAIN_GROUND
    if not style.plain:
        ground = Ground(TONES[random.integers(len(TONES))], PATTERNS[random.integers(len(PATTERNS))])

    while True:
        segments = _sample_segments(random, style)
        objects = _place(random, segments, aspect, style)
        # Long ways may leave no room for another one: all is then sampled again.
        if len(objects) == len(segments):
            pattern_seed = int(random.integers(2**31))
            return MovingScene(aspect, ground, segments, tuple(objects), pattern_seed, style.scale)


def combination_of(scene: MovingScene) -> int:
    """Return the number, from 0 to 7, of the first object's combination of color, shape and motion.

    A dataset without the combinations of one number still has every two of its colors, shapes and motions
    together: prompts of that number are new only as a whole.
    """
    first = scene.segments[0]
    numbers = (
        COLORS.index(first.segment.colour),
        SHAPES.index(first.segment.shape),
        MOTIONS.index(first.motion),
    )
    return sum(numbers) % COMBINATIONS


def _sample_segments(random: np.random.Generator, style: SceneStyle) -> tuple[MovingSegment, ...]:
    """Sample what is stated: color, shape and motion always; the rest half of the time, or never if plain."""
    count = int(random.integers(1, min(style.objects or MAX_MOVING, MAX_MOVING) + 1))
    colors, shapes = random.permutation(len(COLORS))[:count], random.permutation(len(SHAPES))[:count]
    motions = [MOTIONS[number] for number in random.integers(len(MOTIONS), size=count)]
    # A clip in which nothing moves says nothing about motion.
    if all(motion == "still" for motion in motions):
        motions[0] = MOTIONS[random.integers(MOTIONS.index("still"))]

    segments = []
    for color, shape, motion in zip(colors.tolist(), shapes.tolist(), motions, strict=True):
        size, texture = SIZES[random.integers(len(SIZES))], TEXTURES[random.integers(len(TEXTURES))]
        has_size, has_texture, has_speed = (random.random(3) < (0 if style.plain else 0.5)).tolist()
        segment = Segment(
            COLORS[color],
            SHAPES[shape],
            size if has_size and motion not in RESIZING else None,
            texture if has_texture else None,
        )

        speed = SPEEDS[random.integers(len(SPEEDS))] if has_speed and motion != "still" else None
        segments.append(MovingSegment(segment, motion, speed))
    return tuple(segments)


def _place(
    random: np.random.Generator, segments: Sequence[MovingSegment], aspect: float, style: SceneStyle
) -> list[MovingObject]:
    """Return the objects of some segments, or of the first of them if there is no room for more."""
    width, height = plane_sides(aspect)

    objects: list[MovingObject] = []
    for item in segments:
        speed = item.speed or SPEEDS[random.integers(len(SPEEDS))]
        way, ratio = (PLAIN_SHIFT, PLAIN_RATIO) if style.plain else (SHIFTS[speed], RATIOS[speed])
        size = item.segment.size or SIZES[random.integers(len(SIZES))]
        if style.plain:
            size = "large"
        extent = style.scale * (MIDDLE_EXTENT if item.motion in RESIZING else EXTENTS[size])

        for _ in range(PLACE_TRIALS):
            x, y = random.uniform(0, width), random.uniform(0, height)
            placed = _moving_object(item, way, ratio, extent, x, y)
            left, top, right, bottom = placed.box
            is_inside = left >= 0 and top >= 0 and right <= width and bottom <= height
            if is_inside and not any(_meet(placed, other) for other in objects):
                objects.append(placed)
                break
        else:
            return objects
    return objects


def _moving_object(
    item: MovingSegment, way: float, ratio: float, size: float, x: float, y: float
) -> MovingObject:
    """Return the object of a segment that has its center at (x, y) in the middle of the clip."""
    right, down = DIRECTIONS.get(item.motion, (0, 0))
    way /= 2

    first = last = size
    if item.motion in RESIZING:
        first, last = size / math.sqrt(ratio), size * math.sqrt(ratio)
        if item.motion == "shrinking":
            first, last = last, first

    start = (round(x - right * way, 4), round(y - down * way, 4), first)
    end = (round(x + right * way, 4), round(y + down * way, 4), last)

    segment = item.segment
    return MovingObject(segment.colour, segment.shape, segment.texture or "plain", start, end)


def _meet(a: MovingObject, b: MovingObject) -> bool:
    """True if two objects come closer than `MIN_GAP` to one another's way."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = a.box, b.box

    apart = max(left - right2, left2 - right, top - bottom2, top2 - bottom)
    return apart < MIN_GAP


def render_moving_scene(scene: MovingScene, frames: int, height: int, width: int) -> np.ndarray:
    """Render a clip; the plane is stretched if the aspect is not width / height.

    Returns:
        uint8 [frames, height, width, 3].
    """
    ground = render_ground(scene.ground, scene.seed, height, width)
    clip = np.empty((frames, height, width, 3), np.uint8)

    for number in range(frames):
        image = ground.copy()
        for item in scene.objects:
            x, y, extent = item.at(number / max(1, frames - 1))
            blend_object(image, plane_sides(scene.aspect), item, x, y, extent)
        clip[number] = to_levels(image)
    return clip


def moving_prompts(
    count: int,
    kind: MovingCaptionKind | None = None,
    aspect: float = 1.0,
    seed: int = HELD_OUT_SEED,
    style: SceneStyle = ANY_STYLE,
    objects: int | None = None,
    combination: int | None = None,
) -> list[MovingPrompt]:
    """Return the first `count` prompts of a seed.

    Args:
        count: number of prompts.
        kind: caption kind of all prompts; None = all kinds in turn.
        aspect: width / height of the clips.
        seed: seed of the set of scenes.
        style: that of the scenes of the dataset.
        objects: of each scene; None = any number.
        combination: of each scene, see `combination_of`; None = any.
    """
    prompts: list[MovingPrompt] = []
    for index in itertools.count():
        if len(prompts) == count:
            break
        scene = sample_moving_scene(seed, index, aspect, style)
        wanted = objects in (None, len(scene.segments)) and combination in (None, combination_of(scene))
        if wanted:
            chosen = kind or MOVING_CAPTION_KINDS[index % len(MOVING_CAPTION_KINDS)]
            prompts.append(MovingPrompt(scene, caption_moving_scene(scene, chosen, seed, index)))
    return prompts


def caption_moving_scene(scene: MovingScene, kind: MovingCaptionKind, seed: int, index: int) -> MovingCaption:
    """Return the caption of one kind; equal arguments give equal captions.

    `list`: the objects with their motions and nothing else. `sentence`: a sentence with the ground. `zh`: the
    same in Chinese.

    Args:
        scene: the scene to describe.
        kind: style of the caption.
        seed: seed of the set of scenes.
        index: index of the scene within the set.
    """
    # The key ends with the kind, since (seed, index) alone is the scene's own.
    random = np.random.default_rng([seed, index, 1 + MOVING_CAPTION_KINDS.index(kind)])

    segments = tuple(scene.segments[number] for number in random.permutation(len(scene.segments)).tolist())
    return MovingCaption(kind, _WRITERS[kind](segments, scene.ground, random), segments)


def _named(item: MovingSegment) -> str:
    return with_article(adjectives_and_noun(item.segment))


def _moves(item: MovingSegment) -> str:
    return f"{_VERBS[item.motion]}{_ADVERBS[item.speed]}"


# All writers have one signature, though a list needs the segments alone.
def _list(segments: Sequence[MovingSegment], ground: object, random: object) -> str:
    return capitalize(join_words([f"{_named(item)} that {_moves(item)}" for item in segments])) + "."


def _sentence(segments: Sequence[MovingSegment], ground: Ground, random: np.random.Generator) -> str:
    background = f"on a {ground.pattern} {ground.tone} ground"

    clauses = join_words([f"{_named(item)} {_moves(item)}" for item in segments])
    texts = [f"{clauses}, {background}", f"{background}, {clauses}", f"in this clip, {clauses} {background}"]
    return capitalize(texts[random.integers(len(texts))]) + "."


def _zh(segments: Sequence[MovingSegment], ground: Ground, random: np.random.Generator) -> str:
    start = ["画面中", "视频里", ""][random.integers(3)]
    clauses = "，".join(
        f"一个{zh_name(item.segment)}{_ZH_ADVERBS[item.speed]}{_ZH_VERBS[item.motion]}" for item in segments
    )
    return f"{start}{clauses}，背景是{zh_ground(ground)}。"


_WRITERS: dict[MovingCaptionKind, Callable[..., str]] = {"list": _list, "sentence": _sentence, "zh": _zh}
