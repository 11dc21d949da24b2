"""Whether a picture follows its scene caption: exact, and without a network.

The objects that are seen in a picture are given to the caption's segments one to one, so that as much as possible of what the
segments say holds; an object of which less than half holds is not the segment's. An attribute of a segment is right where all
of its objects have it; a count, where as many are there as are said, and no more that look the same. A relation is right where
the two centres lie so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_prep.scenes.captions import SceneCaption
from data_prep.scenes.grammar import Direction, Scene, Segment
from pipeline.following.reading import SeenObject

MIN_OFFSET = 0.03
"""Least distance of centres along a relation's axis, in scene units."""


@dataclass(frozen=True)
class Claim:
    """One thing that a caption says, and whether the picture shows it."""

    picture: int
    attribute: str
    """`colour`, `shape`, `size`, `texture`, `count` or `relation`."""
    position: int
    """Of the segment in the caption; of a relation, that of its subject."""
    length: int
    """Segments in the caption."""
    right: bool


@dataclass(frozen=True)
class SceneScores:
    """The claims of many captions, each judged; tables give (share of right claims, number of claims)."""

    claims: tuple[Claim, ...]

    def table(self, by: Callable[[Claim], object]) -> dict[object, tuple[float, int]]:
        """Share and number of claims, grouped."""
        groups: dict[object, list[bool]] = {}
        for claim in self.claims:
            groups.setdefault(by(claim), []).append(claim.right)
        return {key: (float(np.mean(groups[key])), len(groups[key])) for key in sorted(groups, key=str)}

    def by_attribute(self) -> dict[object, tuple[float, int]]:
        """Colour, shape, size, texture, count, relation."""
        return self.table(lambda claim: claim.attribute)

    def segments(self) -> "SceneScores":
        """One claim a segment, `segment`: all that is said of it alone is right."""
        whole: dict[tuple[int, int, int], bool] = {}
        for claim in self.claims:
            if claim.attribute != "relation":
                key = claim.picture, claim.position, claim.length
                whole[key] = whole.get(key, True) and claim.right
        return SceneScores(
            tuple(Claim(picture, "segment", place, length, right) for (picture, place, length), right in whole.items())
        )

    def by_position(self) -> dict[object, tuple[float, int]]:
        """Whole segments by their position in the caption, from 0."""
        return self.segments().table(lambda claim: claim.position)

    def by_length(self) -> dict[object, tuple[float, int]]:
        """Whole segments by the number of segments in the caption."""
        return self.segments().table(lambda claim: claim.length)

    def summary(self) -> dict[str, float]:
        """Shares of right claims by attribute, of right `segment`s, and of `caption`s of which everything is right."""
        if not self.claims:
            return {}
        tables = {**self.by_attribute(), **self.segments().by_attribute()}
        captions = [share == 1.0 for share, _ in self.table(lambda claim: claim.picture).values()]
        return {**{str(name): share for name, (share, _) in tables.items()}, "caption": float(np.mean(captions))}


def score_seen(seen: Sequence[Sequence[SeenObject]], captions: Sequence[SceneCaption]) -> SceneScores:
    """Judge each caption against the objects that were seen in its picture.

    Raises:
        ValueError: there are more or fewer pictures than captions.
    """
    claims: list[Claim] = []
    for number, (objects, caption) in enumerate(zip(seen, captions, strict=True)):
        claims += judge(number, objects, caption)
    return SceneScores(tuple(claims))


def judge(picture: int, seen: Sequence[SeenObject], caption: SceneCaption) -> list[Claim]:
    """All claims of one caption."""
    given = assign_objects(seen, caption.segments)
    length = len(caption.segments)
    taken = {number for numbers in given for number in numbers}
    claims = []
    for position, (segment, numbers) in enumerate(zip(caption.segments, given, strict=True)):
        for name, value in segment.said.items():
            right = bool(numbers) and all(getattr(seen[number], name) == value for number in numbers)
            claims.append(Claim(picture, name, position, length, right))
        if segment.count > 1:
            more = [number for number in range(len(seen)) if number not in taken and _share(seen[number], segment) == 1.0]
            claims.append(Claim(picture, "count", position, length, len(numbers) + len(more) == segment.count))
    for relation in caption.relations:
        subject, other = given[relation.subject], given[relation.other]
        right = bool(subject and other) and lies(seen[subject[0]], relation.direction, seen[other[0]])
        claims.append(Claim(picture, "relation", relation.subject, length, right))
    return claims


def assign_objects(seen: Sequence[SeenObject], segments: Sequence[Segment]) -> list[list[int]]:
    """Numbers of the seen objects that are each segment's."""
    owners = [position for position, segment in enumerate(segments) for _ in range(segment.count)]
    given: list[list[int]] = [[] for _ in segments]
    if not seen or not owners:
        return given
    shares = np.array([[_share(item, segments[owner]) for item in seen] for owner in owners])
    shares[shares < 0.5] = 0.0
    for row, column in zip(*linear_sum_assignment(shares, maximize=True), strict=True):
        if shares[row, column] > 0:
            given[owners[row]].append(int(column))
    return given


def _share(item: SeenObject, segment: Segment) -> float:
    """How much of what is said of a segment holds for an object."""
    said = segment.said
    return sum(getattr(item, name) == value for name, value in said.items()) / len(said)


def lies(subject: SeenObject, direction: Direction, other: SeenObject) -> bool:
    """Whether one object lies in a direction of another."""
    offset = {
        "left of": other.x - subject.x,
        "right of": subject.x - other.x,
        "above": other.y - subject.y,
        "below": subject.y - other.y,
    }
    return offset[direction] >= MIN_OFFSET


def true_objects(scene: Scene) -> list[SeenObject]:
    """The scene's objects as a perfect reader sees them."""
    return [SeenObject(item.colour, item.shape, item.size, item.texture, item.x, item.y) for item in scene.objects]


def chance_level(seen: Sequence[Sequence[SeenObject]], captions: Sequence[SceneCaption], shifts: int = 16) -> dict[str, float]:
    """What `SceneScores.summary` gives where pictures know nothing of their captions: each caption is held against the pictures
    of the next `shifts` ones. It belongs to the pictures, not to the prompts alone: one that is full of things, noise too, has
    something for more captions than one with few."""
    pairs = [(i, (i + shift) % len(seen)) for shift in range(1, min(shifts + 1, len(seen))) for i in range(len(seen))]
    return score_seen([seen[other] for _, other in pairs], [captions[i] for i, _ in pairs]).summary()


def prompt_following(summary: dict[str, float]) -> float:
    """The paper's T2I-avg, on scenes: the mean of colour, shape and texture, each the share of right claims; of those that the
    captions say."""
    return float(np.mean([summary[name] for name in ("colour", "shape", "texture") if name in summary]))
