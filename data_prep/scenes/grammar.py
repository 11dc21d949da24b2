"""Synthetic scenes whose content is known exactly: the grammar, and a sampler keyed by (seed, index).

A scene has 1 to 8 objects in groups of equal ones. Lengths are in units of the square root of the image's
area, so a scene means the same image at any resolution. x increases to the right and y increases downwards.

Any two groups of a scene differ in at least two attributes that the caption states for both. An object with
one wrong attribute is therefore still closest to its own group, and a scorer can report which attribute was
wrong.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "star", "heart"]
Size = Literal["small", "large"]
Texture = Literal["plain", "striped", "dotted", "checkered"]
Color = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
Pattern = Literal["plain", "speckled", "lined", "checked"]
Tone = Literal["white", "dark grey", "black"]
Direction = Literal["left of", "right of", "above", "below"]
Attribute = Literal["colour", "shape", "size", "texture"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
COLORS: tuple[Color, ...] = get_args(Color)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
TONES: tuple[Tone, ...] = get_args(Tone)
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

COMBINATIONS = 8
"""Groups of combinations of attributes, of which a dataset can leave out one."""
MAX_OBJECTS = 8
MAX_GROUP = 4
"""Maximum number of equal objects in one group."""
MAX_PLAIN_GROUPS = min(len(COLORS), len(SHAPES))
"""Maximum number of groups of a plain scene: any two differ in both, color and shape."""
EXTENTS: dict[Size, float] = {"small": 0.175, "large": 0.25}
"""Side of the square that a shape fills, times the scene's `scale`: 11 and 16 pixels of 64 at scale 1."""
MIN_GAP = 0.035
"""Minimum distance between two objects."""
MIN_RELATION_OFFSET = 0.1
"""Minimum distance between two centers, along the relation's axis, for a caption to state a relation."""
SEGMENT_TRIALS = 1000
"""Samples after which a set of segments is abandoned and sampled again from the start."""


@dataclass(frozen=True)
class Segment:
    """The part of a caption about one group: `count` objects. An attribute that is None is not stated."""

    colour: Color
    shape: Shape
    size: Size | None = None
    texture: Texture | None = None
    count: int = 1

    @property
    def stated(self) -> dict[Attribute, str]:
        """The attributes that are stated, by name."""
        return {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SceneObject:
    """One object: all of its attributes, and the position of its center."""

    colour: Color
    shape: Shape
    size: Size
    texture: Texture
    x: float
    y: float
    group: int
    """Index of its segment in the scene."""


@dataclass(frozen=True)
class SceneStyle:
    """Limits of the scenes of a set; the default is any scene."""

    scale: float = 1.0
    """Size of the objects, as a multiple of `EXTENTS`; larger ones leave room for fewer."""
    plain: bool = False
    """All objects large and without texture, all grounds white."""
    objects: int | None = None
    """Maximum number of objects; None = as many as there is room for."""

    @property
    def suffix(self) -> str:
        """The style at the end of a scene's key, `-1.6-plain-3`; empty for the default."""
        scale = "" if self.scale == 1.0 else f"-{self.scale}"
        return scale + ("-plain" if self.plain else "") + (f"-{self.objects}" if self.objects else "")

    @classmethod
    def parse(cls, suffix: str) -> "SceneStyle":
        """Read back a suffix.

        Raises:
            ValueError: if it is none.
        """
        match = re.fullmatch(r"(?:-(\d+\.\d+))?(-plain)?(?:-(\d+))?", suffix)
        if match is None:
            raise ValueError(f"no style of scenes: {suffix!r}")
        return cls(float(match[1] or 1), match[2] is not None, int(match[3]) if match[3] else None)


ANY_STYLE = SceneStyle()


@dataclass(frozen=True)
class Ground:
    """The background. It is always gray, so that color separates objects from it."""

    tone: Tone
    pattern: Pattern


PLAIN_GROUND = Ground("white", "plain")


@dataclass(frozen=True)
class Relation:
    """Segment `subject` is in `direction` of segment `other`; both have a single object."""

    subject: int
    direction: Direction
    other: int


@dataclass(frozen=True)
class Scene:
    """The ground truth of one image."""

    aspect: float
    """Width / height."""
    ground: Ground
    segments: tuple[Segment, ...]
    objects: tuple[SceneObject, ...]
    seed: int
    """Seed of the ground's pattern."""
    scale: float = 1.0
    """Size of its objects, as a multiple of `EXTENTS`."""

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height in the scene's unit."""
        return plane_sides(self.aspect)

    def relations(self) -> list[Relation]:
        """Return every clear relation between two single objects.

        A relation is along the axis on which the two are further apart, and at least `MIN_RELATION_OFFSET`
        apart.
        """
        # The direction of a group of several objects would be unclear.
        single = {item.group: item for item in self.objects if self.segments[item.group].count == 1}

        relations: list[Relation] = []
        for subject, a in single.items():
            for other, b in single.items():
                direction = clear_direction(a.x - b.x, a.y - b.y)
                if subject != other and direction is not None:
                    relations.append(Relation(subject, direction, other))
        return relations


def combination_of(scene: Scene) -> int:
    """Return the lowest number, from 0 to 7, of the combinations of color and shape in a scene.

    A dataset without combination 0 still has every color and every shape, but each color lacks at most one
    shape in all of its scenes: a prompt of combination 0 asks for an object that was never seen.
    """
    return min(
        (COLORS.index(segment.colour) + SHAPES.index(segment.shape)) % COMBINATIONS
        for segment in scene.segments
    )


def plane_sides(aspect: float) -> tuple[float, float]:
    """Return width and height of a plane of area 1 with this width / height."""
    return math.sqrt(aspect), 1 / math.sqrt(aspect)


def clear_direction(dx: float, dy: float) -> Direction | None:
    """Return the direction of an offset (dx, dy), or None if it is too short or diagonal to be clear."""
    if max(abs(dx), abs(dy)) < MIN_RELATION_OFFSET or abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def capacity(aspect: float, scale: float = 1.0) -> tuple[int, int]:
    """Return columns and rows of the finest grid whose cells can each contain a large object of a scale."""
    width, height = plane_sides(aspect)
    # The small term keeps a side that is a multiple of the cell from being rounded down.
    cell = scale * EXTENTS["large"] + MIN_GAP
    return max(1, int(width / cell + 1e-9)), max(1, int(height / cell + 1e-9))


def sample_scene(
    seed: int,
    index: int,
    aspect: float = 1.0,
    segments: int | None = None,
    ground: Ground | None = None,
    style: SceneStyle = ANY_STYLE,
) -> Scene:
    """Return the scene of (seed, index): equal arguments give equal scenes, on any machine.

    Args:
        seed: seed of a set of scenes.
        index: index within the set.
        aspect: width / height of the image.
        segments: number of groups, with one object each; None = random groups.
        ground: the background; None = random.
        style: what all scenes of the set have in common.

    Returns:
        A scene with at most `MAX_OBJECTS` objects, fewer where aspect and style leave less room.
    """
    # The order of the calls to `random` defines the scenes: another order would change every dataset.
    random = np.random.default_rng([seed, index])
    columns, rows = capacity(aspect, style.scale)
    max_objects = min(style.objects or MAX_OBJECTS, MAX_OBJECTS, columns * rows)
    total = int(random.integers(1, max_objects + 1))
    counts = _sample_counts(random, total) if segments is None else [1] * min(segments, max_objects)
    if style.plain:
        counts = counts[:MAX_PLAIN_GROUPS]

    ground = ground or _sample_ground(random, style)
    scene_segments = _sample_segments(random, counts, style)
    # A generator, so each center is sampled just before its object: part of the order that defines scenes.
    centers = _sample_centers(random, sum(counts), aspect, style.scale)

    objects: list[SceneObject] = []
    for group, segment in enumerate(scene_segments):
        size = segment.size or _sample_size(random, style)
        for _ in range(segment.count):
            objects.append(_place_object(random, segment, size, next(centers), group, style.scale))
    pattern_seed = int(random.integers(2**31))
    return Scene(aspect, ground, tuple(scene_segments), tuple(objects), pattern_seed, style.scale)


def _place_object(
    random: np.random.Generator,
    segment: Segment,
    size: Size,
    center: tuple[float, float],
    group: int,
    scale: float,
) -> SceneObject:
    """Build an object of a segment near the center of its cell."""
    # cells fit large objects, so a small one can move
    slack = scale * (EXTENTS["large"] - EXTENTS[size])
    x, y = (value + slack / 2 * random.uniform(-1, 1) for value in center)
    texture = segment.texture or "plain"
    return SceneObject(segment.colour, segment.shape, size, texture, round(x, 4), round(y, 4), group)


def _sample_ground(random: np.random.Generator, style: SceneStyle) -> Ground:
    if style.plain:
        return PLAIN_GROUND
    return Ground(TONES[random.integers(len(TONES))], _sample_pattern(random))


def _sample_size(random: np.random.Generator, style: SceneStyle) -> Size:
    """Sample a size that is not stated."""
    return "large" if style.plain else SIZES[random.integers(len(SIZES))]


def _sample_pattern(random: np.random.Generator) -> Pattern:
    """Sample a ground pattern; half of them are plain."""
    return "plain" if random.random() < 0.5 else PATTERNS[random.integers(1, len(PATTERNS))]


def _sample_counts(random: np.random.Generator, total: int) -> list[int]:
    """Split `total` objects into groups: mostly single objects, at most `MAX_GROUP` equal ones."""
    counts: list[int] = []
    while (left := total - sum(counts)) > 0:
        several = left > 1 and random.random() < 0.25
        counts.append(int(random.integers(2, min(MAX_GROUP, left) + 1)) if several else 1)
    return counts


def _sample_segments(random: np.random.Generator, counts: Sequence[int], style: SceneStyle) -> list[Segment]:
    """Sample one segment per group.

    Color and shape are always stated, size and texture half of the time, of plain scenes never.
    """
    # A set of segments can leave no room for another one. It is then sampled again from the start.
    while True:
        segments: list[Segment] = []
        for _ in range(SEGMENT_TRIALS):
            size = SIZES[random.integers(len(SIZES))] if random.random() < 0.5 else None
            texture = TEXTURES[random.integers(len(TEXTURES))] if random.random() < 0.5 else None
            color, shape = COLORS[random.integers(len(COLORS))], SHAPES[random.integers(len(SHAPES))]
            if style.plain:
                size = texture = None
            candidate = Segment(color, shape, size, texture, counts[len(segments)])

            if all(differences(candidate, other) >= 2 for other in segments):
                segments.append(candidate)
            if len(segments) == len(counts):
                return segments


def differences(a: Segment, b: Segment) -> int:
    """Return the number of attributes, out of those stated for both, in which two segments differ."""
    return sum(a.stated[name] != b.stated[name] for name in a.stated.keys() & b.stated.keys())


def _sample_centers(
    random: np.random.Generator, count: int, aspect: float, scale: float
) -> Iterator[tuple[float, float]]:
    """Sample centers of `count` large objects that keep their distance, in random order."""
    max_columns, max_rows = capacity(aspect, scale)
    # Grids coarser than the finest one are allowed too: objects then have more room to move.
    grids: list[tuple[int, int]] = []
    for columns in range(1, max_columns + 1):
        grids += [(columns, rows) for rows in range(1, max_rows + 1) if columns * rows >= count]
    columns, rows = grids[random.integers(len(grids))]

    # An object can move inside its cell as far as its neighbors' gap allows.
    plane_width, plane_height = plane_sides(aspect)
    width, height = plane_width / columns, plane_height / rows
    room = scale * EXTENTS["large"] + MIN_GAP
    for cell in random.permutation(columns * rows)[:count].tolist():
        row, column = divmod(cell, columns)
        yield (
            (column + 0.5) * width + max(0.0, width - room) / 2 * random.uniform(-1, 1),
            (row + 0.5) * height + max(0.0, height - room) / 2 * random.uniform(-1, 1),
        )
