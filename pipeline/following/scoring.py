"""Score how well an image follows its scene caption: exact, and without a network.

The objects detected in an image are assigned one-to-one to the caption's segments, so that as many of the
segments' claims as possible are correct. An object with less than half of a segment's attributes is not
assigned to it. Each claim of the caption is then judged:

- An attribute is correct if all objects of the segment have it.
- A count is correct if the segment has that many objects, and no others look the same.
- A relation is correct if the two centers are in that direction from one another.
- What is said to be absent is, if no object has all of its attributes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_prep.scenes.captions import SceneCaption
from data_prep.scenes.grammar import Direction, Segment
from pipeline.following.reading import DetectedObject

MIN_OFFSET = 0.03
"""Minimum distance of centers along a relation's axis, in scene units."""
OF_NO_SEGMENT = ("relation", "absent")
"""Attributes of claims that belong to no single segment."""
MIN_SHARE = 0.5
"""Minimum share of a segment's attributes that an assigned object has."""


@dataclass(frozen=True)
class Claim:
    """One claim of a caption, and the judgment on it."""

    image: int
    attribute: str
    """`colour`, `shape`, `size`, `texture`, `count`, `relation` or `absent`."""
    position: int
    """Index of the segment in the caption; for a relation, that of its subject; for what is absent, 0."""
    length: int
    """Number of segments in the caption."""
    correct: bool


@dataclass(frozen=True)
class SceneScores:
    """The judged claims of many captions. Tables map to (share of correct claims, number of claims)."""

    claims: tuple[Claim, ...]

    def table(self, by: Callable[[Claim], object]) -> dict[object, tuple[float, int]]:
        """Return share and number of claims, grouped by a key of the claim."""
        groups: dict[object, list[bool]] = {}
        for claim in self.claims:
            groups.setdefault(by(claim), []).append(claim.correct)
        # Sorted as text, because keys may be of any type.
        return {key: (float(np.mean(groups[key])), len(groups[key])) for key in sorted(groups, key=str)}

    def by_attribute(self) -> dict[object, tuple[float, int]]:
        """Claims by attribute: color, shape, size, texture, count, relation."""
        return self.table(lambda claim: claim.attribute)

    def segments(self) -> "SceneScores":
        """Return one claim per segment, `segment`: correct if all of its own claims are."""
        # A relation belongs to two segments, and what is absent to none.
        judgments: dict[tuple[int, int, int], bool] = {}
        for claim in self.claims:
            if claim.attribute not in OF_NO_SEGMENT:
                key = claim.image, claim.position, claim.length
                judgments[key] = judgments.get(key, True) and claim.correct

        return SceneScores(
            tuple(
                Claim(image, "segment", position, length, correct)
                for (image, position, length), correct in judgments.items()
            )
        )

    def by_position(self) -> dict[object, tuple[float, int]]:
        """Whole segments by their position in the caption, from 0."""
        return self.segments().table(lambda claim: claim.position)

    def by_length(self) -> dict[object, tuple[float, int]]:
        """Whole segments by the number of segments in the caption."""
        return self.segments().table(lambda claim: claim.length)

    def summary(self) -> dict[str, float]:
        """Shares of correct claims by attribute, of correct `segment`s, and of `caption`s without a wrong
        claim."""
        if not self.claims:
            return {}
        tables = {**self.by_attribute(), **self.segments().by_attribute()}
        shares = {str(name): share for name, (share, _) in tables.items()}

        by_image = self.table(lambda claim: claim.image).values()
        return {**shares, "caption": float(np.mean([share == 1.0 for share, _ in by_image]))}


D = TypeVar("D")
C = TypeVar("C")
Judge = Callable[[int, Sequence[D], C], list[Claim]]
"""Function of a number for the claims, what was detected, and the caption."""


def score_objects(
    detected: Sequence[Sequence[DetectedObject]], captions: Sequence[SceneCaption]
) -> SceneScores:
    """Judge each caption against the objects that were detected in its image.

    Raises:
        ValueError: if the numbers of images and captions differ.
    """
    return score_all(judge_caption, detected, captions)


def score_all(judge: Judge[D, C], detected: Sequence[Sequence[D]], captions: Sequence[C]) -> SceneScores:
    """Judge each caption against what was detected for it."""
    claims: list[Claim] = []
    for number, (objects, caption) in enumerate(zip(detected, captions, strict=True)):
        claims += judge(number, objects, caption)
    return SceneScores(tuple(claims))


def judge_caption(image: int, objects: Sequence[DetectedObject], caption: SceneCaption) -> list[Claim]:
    """Return all claims of one caption, judged against the objects of its image.

    Args:
        image: index that the claims carry.
        objects: the objects detected in the image.
        caption: the caption.
    """
    assigned = assign_objects(objects, caption.segments)
    length = len(caption.segments)
    taken = set().union(*assigned)
    unassigned = [item for number, item in enumerate(objects) if number not in taken]

    claims = []
    for position, (segment, numbers) in enumerate(zip(caption.segments, assigned, strict=True)):
        for name, value in segment.stated.items():
            # Without an object the claim is wrong, whereas `all` of nothing is true.
            correct = bool(numbers) and all(getattr(objects[number], name) == value for number in numbers)
            claims.append(Claim(image, name, position, length, correct))

        # Surplus objects are unassigned ones that look the same. They make a count wrong, and no other claim.
        if segment.count > 1:
            surplus = sum(_matching_share(item, segment) == 1.0 for item in unassigned)
            claims.append(Claim(image, "count", position, length, len(numbers) + surplus == segment.count))

    for relation in caption.relations:
        # Captions state relations between single objects only.
        subject, other = assigned[relation.subject], assigned[relation.other]
        correct = bool(subject and other) and is_in_direction(
            objects[subject[0]], relation.direction, objects[other[0]]
        )
        claims.append(Claim(image, "relation", relation.subject, length, correct))

    for segment in caption.absent:
        correct = all(_matching_share(item, segment) < 1.0 for item in objects)
        claims.append(Claim(image, "absent", 0, length, correct))

    return claims


def assign_objects(objects: Sequence[DetectedObject], segments: Sequence[Segment]) -> list[list[int]]:
    """Return the indices of the objects that are assigned to each segment."""
    assigned: list[list[int]] = [[] for _ in segments]
    # A segment takes part once for each of its objects.
    owners: list[int] = []
    for position, segment in enumerate(segments):
        owners += [position] * segment.count
    if not objects or not owners:
        return assigned

    shares = np.empty((len(owners), len(objects)))
    for row, owner in enumerate(owners):
        shares[row] = [_matching_share(item, segments[owner]) for item in objects]
    # Weight 0 means not assigned: a wrong object must not replace a missing one.
    shares[shares < MIN_SHARE] = 0.0

    # Several assignments can be best; one of weight 0 is none.
    for row, column in zip(*linear_sum_assignment(shares, maximize=True), strict=True):
        if shares[row, column] > 0:
            assigned[owners[row]].append(int(column))

    return assigned


def _matching_share(item: DetectedObject, segment: Segment) -> float:
    """Return the share of a segment's stated attributes that an object has."""
    stated = segment.stated
    return sum(getattr(item, name) == value for name, value in stated.items()) / len(stated)


def is_in_direction(subject: DetectedObject, direction: Direction, other: DetectedObject) -> bool:
    """True if `subject` is in a direction of `other`, by at least `MIN_OFFSET`."""
    # y increases downward.
    offsets = {
        "left of": other.x - subject.x,
        "right of": subject.x - other.x,
        "above": other.y - subject.y,
        "below": subject.y - other.y,
    }
    return offsets[direction] >= MIN_OFFSET


def chance_level(
    detected: Sequence[Sequence[DetectedObject]], captions: Sequence[SceneCaption], shifts: int = 16
) -> dict[str, float]:
    """Return `SceneScores.summary` of images against other images' captions, that is, the chance level.

    It depends on the images: a cluttered or noisy image matches more captions by chance.

    Args:
        detected: the objects of each image.
        captions: their captions.
        shifts: each caption is compared with the images of this many captions that follow it.
    """
    return score_others(judge_caption, detected, captions, shifts)


def score_others(
    judge: Judge[D, C], detected: Sequence[Sequence[D]], captions: Sequence[C], shifts: int
) -> dict[str, float]:
    """Return the summary of each caption against what was detected for `shifts` captions that follow it."""
    # Shift what was detected against the captions, so that nothing meets its own caption.
    others: list[Sequence[D]] = []
    repeated: list[C] = []
    for shift in range(1, min(shifts + 1, len(detected))):
        others += [*detected[shift:], *detected[:shift]]
        repeated += captions
    return score_all(judge, others, repeated).summary()


def prompt_following(summary: dict[str, float]) -> float:
    """Return the mean share of correct claims over color, shape and texture: the paper's T2I-avg, on scenes.

    Attributes that no caption states are left out.
    """
    return float(np.mean([summary[name] for name in ("colour", "shape", "texture") if name in summary]))
