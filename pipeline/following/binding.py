"""Binding: does an image fit its caption better than one of the same words, with two of them exchanged?

`A red circle and a blue square` and `A blue circle and a red square` have the same words. A model that knows
the words of a prompt and not what belongs together fits both alike, which is 50 %.
"""

from collections.abc import Sequence
from dataclasses import replace

from data_prep.scenes.captions import SceneCaption
from data_prep.scenes.grammar import Segment
from pipeline.following.reading import DetectedObject
from pipeline.following.scoring import judge_caption


def exchanged(caption: SceneCaption) -> SceneCaption | None:
    """Return the caption with an attribute of its first two segments exchanged: the color, else the shape.

    Only the claims are exchanged; `text` is left as it is.

    Returns:
        None if there is no second segment, or the exchanged segments would be two of the caption's own again.
    """
    if len(caption.segments) < 2:
        return None

    first, second, *others = caption.segments
    swapped = _swap(first, second)
    if set(swapped) & {first, second, *others}:
        return None
    return replace(caption, segments=(*swapped, *others), relations=(), absent=())


def _swap(first: Segment, second: Segment) -> tuple[Segment, Segment]:
    if first.colour != second.colour:
        return replace(first, colour=second.colour), replace(second, colour=first.colour)
    return replace(first, shape=second.shape), replace(second, shape=first.shape)


def binding(
    detected: Sequence[Sequence[DetectedObject]], captions: Sequence[SceneCaption]
) -> tuple[float, int]:
    """Return the share of images that fit their caption better than the exchanged one, and their number.

    An image that fits both alike counts half.

    Args:
        detected: the objects of each image.
        captions: their captions; those of one segment are left out.

    Raises:
        ValueError: if the numbers of images and captions differ.
    """
    points, count = 0.0, 0
    for objects, caption in zip(detected, captions, strict=True):
        other = exchanged(caption)
        if other is None:
            continue

        points += fits_better(objects, replace(caption, relations=(), absent=()), other)
        count += 1

    return (points / count if count else 0.0), count


def fits_better(objects: Sequence[DetectedObject], caption: SceneCaption, other: SceneCaption) -> float:
    """Return 1 if an image fits a caption better than another one, 0.5 if both alike, else 0.

    Only claims on the first two segments count: those that are exchanged.
    """
    own, theirs = _correct(objects, caption), _correct(objects, other)
    return 1.0 if own > theirs else 0.5 if own == theirs else 0.0


def _correct(objects: Sequence[DetectedObject], caption: SceneCaption) -> int:
    """Return the number of correct claims on the two segments that are exchanged."""
    return sum(claim.correct for claim in judge_caption(0, objects, caption) if claim.position < 2)
