"""Scenes: pictures whose truth is known. The grammar, and a scene drawn from it by (seed, index).

A scene has 1 to 8 objects in groups of equal ones. Lengths are in units of the square root of the picture's area, so that a
scene means the same picture at any resolution; x runs to the right, y downwards.

Two groups of a scene always differ in two attributes that are said of both. So an object with one wrong attribute still
belongs to its own group, whatever the others look like, and a score can say which attribute was wrong.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "diamond", "cross", "star", "heart"]
Size = Literal["small", "large"]
Texture = Literal["plain", "striped", "dotted", "checkered"]
Colour = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
Pattern = Literal["plain", "speckled", "lined", "checked"]
Tone = Literal["white", "dark grey", "black"]
Direction = Literal["left of", "right of", "above", "below"]
Attribute = Literal["colour", "shape", "size", "texture"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
COLOURS: tuple[Colour, ...] = get_args(Colour)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
TONES: tuple[Tone, ...] = get_args(Tone)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

MAX_OBJECTS = 8
EXTENTS: dict[Size, float] = {"small": 0.175, "large": 0.25}
"""Side of the square that a shape fills: 11 and 16 pixels of a picture of 64 x 64."""
GAP = 0.035
"""Least distance between two objects."""
CLEARLY = 0.1
"""Least distance of centres along the axis of a relation that a caption states."""


@dataclass(frozen=True)
class Segment:
    """What a caption says of one group: `count` objects; an attribute that is None is not said."""

    colour: Colour
    shape: Shape
    size: Size | None = None
    texture: Texture | None = None
    count: int = 1

    @property
    def said(self) -> dict[Attribute, str]:
        """The attributes that are said, by name."""
        return {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SceneObject:
    """One object: all of its attributes, and where its centre lies."""

    colour: Colour
    shape: Shape
    size: Size
    texture: Texture
    x: float
    y: float
    group: int
    """Number of its segment in the scene."""


@dataclass(frozen=True)
class Ground:
    """What lies behind the objects; always without colour, so that colour tells objects from it."""

    tone: Tone
    pattern: Pattern


@dataclass(frozen=True)
class Relation:
    """Segment `subject` lies in `direction` of segment `other`; both are single objects."""

    subject: int
    direction: Direction
    other: int


@dataclass(frozen=True)
class Scene:
    """The truth of one picture."""

    aspect: float
    """Width / height."""
    ground: Ground
    segments: tuple[Segment, ...]
    objects: tuple[SceneObject, ...]
    seed: int
    """Of the ground's pattern."""

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height in the scene's unit."""
        return math.sqrt(self.aspect), 1 / math.sqrt(self.aspect)

    def relations(self) -> list[Relation]:
        """Every relation between two single objects that can be seen at a glance: along the axis on which they are further
        apart, and apart by at least `CLEARLY`."""
        single = {item.group: item for item in self.objects if self.segments[item.group].count == 1}
        return [
            Relation(subject, direction, other)
            for subject, a in single.items()
            for other, b in single.items()
            if subject != other and (direction := clear_direction(a.x - b.x, a.y - b.y)) is not None
        ]


def clear_direction(dx: float, dy: float) -> Direction | None:
    """In which direction something lies that is (dx, dy) away, or None where that is not clear."""
    if max(abs(dx), abs(dy)) < CLEARLY or abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def capacity(aspect: float) -> tuple[int, int]:
    """Columns and rows of the finest grid whose cells hold a large object each."""
    width, height = math.sqrt(aspect), 1 / math.sqrt(aspect)
    cell = EXTENTS["large"] + GAP
    return max(1, int(width / cell + 1e-9)), max(1, int(height / cell + 1e-9))


def sample_scene(seed: int, index: int, aspect: float = 1.0, segments: int | None = None, ground: Ground | None = None) -> Scene:
    """The scene of (seed, index): equal arguments give equal scenes, on any machine.

    Args:
        seed: of a set of scenes.
        index: number within the set.
        aspect: width / height of the picture.
        segments: exactly this many groups of one object each; None = as it comes.
        ground: what lies behind the objects; None = as it comes.
    """
    random = np.random.default_rng([seed, index])
    columns, rows = capacity(aspect)
    most = min(MAX_OBJECTS, columns * rows)
    total = int(random.integers(1, most + 1))
    counts = _counts(random, total) if segments is None else [1] * min(segments, most)
    drawn = ground or Ground(TONES[random.integers(len(TONES))], _pattern(random))
    said = _segments(random, counts)
    places = _places(random, sum(counts), aspect)
    objects: list[SceneObject] = []
    for group, segment in enumerate(said):
        size = segment.size or SIZES[random.integers(len(SIZES))]
        for _ in range(segment.count):
            x, y = next(places)
            room = EXTENTS["large"] - EXTENTS[size]  # a small object has more room in its cell
            x, y = (value + room / 2 * random.uniform(-1, 1) for value in (x, y))
            texture = segment.texture or "plain"
            objects.append(SceneObject(segment.colour, segment.shape, size, texture, round(x, 4), round(y, 4), group))
    return Scene(aspect, drawn, tuple(said), tuple(objects), int(random.integers(2**31)))


def _pattern(random: np.random.Generator) -> Pattern:
    """Half of the grounds are plain."""
    return "plain" if random.random() < 0.5 else PATTERNS[random.integers(1, len(PATTERNS))]


def _counts(random: np.random.Generator, total: int) -> list[int]:
    """Sizes of groups that make `total` objects: mostly single ones, up to four alike."""
    counts: list[int] = []
    while (left := total - sum(counts)) > 0:
        several = left > 1 and random.random() < 0.25
        counts.append(int(random.integers(2, min(4, left) + 1)) if several else 1)
    return counts


def _segments(random: np.random.Generator, counts: Sequence[int]) -> list[Segment]:
    """One segment a group; colour and shape are always said, size and texture each with one half."""
    while True:
        found: list[Segment] = []
        for _ in range(1000):
            size = SIZES[random.integers(len(SIZES))] if random.random() < 0.5 else None
            texture = TEXTURES[random.integers(len(TEXTURES))] if random.random() < 0.5 else None
            colour, shape = COLOURS[random.integers(len(COLOURS))], SHAPES[random.integers(len(SHAPES))]
            new = Segment(colour, shape, size, texture, counts[len(found)])
            if all(differences(new, other) >= 2 for other in found):
                found.append(new)
            if len(found) == len(counts):
                return found


def differences(a: Segment, b: Segment) -> int:
    """In how many of the attributes that are said of both the two differ."""
    return sum(a.said[name] != b.said[name] for name in a.said.keys() & b.said.keys())


def _places(random: np.random.Generator, count: int, aspect: float) -> Iterator[tuple[float, float]]:
    """Centres of `count` large objects that keep their distance, in random order."""
    most_columns, most_rows = capacity(aspect)
    grids = [(c, r) for c in range(1, most_columns + 1) for r in range(1, most_rows + 1) if c * r >= count]
    columns, rows = grids[random.integers(len(grids))]
    width, height = math.sqrt(aspect) / columns, 1 / math.sqrt(aspect) / rows
    room = EXTENTS["large"] + GAP
    for cell in random.permutation(columns * rows)[:count].tolist():
        row, column = divmod(cell, columns)
        yield (
            (column + 0.5) * width + max(0.0, width - room) / 2 * random.uniform(-1, 1),
            (row + 0.5) * height + max(0.0, height - room) / 2 * random.uniform(-1, 1),
        )


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """The truth as plain data."""
    return {
        "aspect": scene.aspect,
        "ground": vars(scene.ground),
        "segments": [vars(segment) for segment in scene.segments],
        "objects": [vars(item) for item in scene.objects],
        "seed": scene.seed,
    }


def scene_from_json(record: dict[str, Any]) -> Scene:
    """Read back what `scene_to_json` wrote."""
    segments = tuple(Segment(**segment) for segment in record["segments"])
    objects = tuple(SceneObject(**item) for item in record["objects"])
    return Scene(record["aspect"], Ground(**record["ground"]), segments, objects, record["seed"])


def change_object(scene: Scene, number: int, **attributes: Any) -> Scene:
    """The scene with other attributes for one object, but the same segments: a picture that does not follow them."""
    objects = list(scene.objects)
    objects[number] = replace(objects[number], **attributes)
    return replace(scene, objects=tuple(objects))
