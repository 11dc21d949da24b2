"""Equal-area aspect-ratio buckets, and the assignment of images and clips to them. Pure functions of
integers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from data_prep.dataset.schema import Bucket
from model.common.errors import UserError

TOO_SMALL = "bucket: would grow too much"
TOO_CROPPED = "bucket: crop would lose too much"
TOO_SHORT = "bucket: too short"


class BucketSettings(Protocol):
    """The fields of `BucketConfig` that define the buckets."""

    resolution: int
    max_aspect: float
    step: int


def make_buckets(config: BucketSettings, frames: Sequence[int] = ()) -> list[Bucket]:
    """Return all buckets of about `resolution`^2 pixels: those of images, then those of clips.

    Sides are multiples of `step`, and the aspect is at most `max_aspect`. For every short side, the long side
    is the multiple nearest to equal area, so areas differ by at most `step` / 2 times the short side. The
    square is always included, and so is the transpose of every bucket.

    Args:
        config: sides and aspects.
        frames: numbers of frames of clips, each with a bucket of every size.

    Raises:
        UserError: if the resolution is not a multiple of the step, or the maximum aspect is below 1.
    """
    if config.step < 1 or config.resolution < config.step or config.resolution % config.step:
        raise UserError(
            f"buckets.resolution={config.resolution} is not a multiple of buckets.step={config.step}: "
            "change one of them"
        )
    if config.max_aspect < 1:
        raise UserError(
            f"buckets.max_aspect={config.max_aspect} is below 1: it is long side / short side, so at least 1"
        )

    buckets = {Bucket(config.resolution, config.resolution)}
    # Short sides stop below the square; the transposes are the other half.
    for short in range(config.step, config.resolution, config.step):
        long = round(config.resolution**2 / short / config.step) * config.step
        if short < long <= config.max_aspect * short:
            buckets |= {Bucket(short, long), Bucket(long, short)}
    # A scene's bucket is a random index into this list, so another order would change every set of scenes.
    images = sorted(buckets, key=lambda bucket: (bucket.height / bucket.width, bucket.height))
    return images + [replace(bucket, frames=number) for number in sorted(frames) for bucket in images]


def with_frames(bucket: Bucket, frames: Sequence[int], usable: int) -> Bucket | str:
    """Return the bucket of a clip: with the largest number of frames that is usable, or the reason why there
    is none.

    Args:
        bucket: height and width.
        frames: numbers of frames to choose from.
        usable: frames that a video has at the clip's rate.
    """
    number = max((number for number in frames if number <= usable), default=0)
    return replace(bucket, frames=number) if number else TOO_SHORT


def assign(
    buckets: list[Bucket], height: int, width: int, max_upscale: float, max_crop: float = 1.0
) -> Bucket | str:
    """Return the bucket nearest in aspect ratio (on a log scale) to an image, or the reason why the image is
    left out.

    Args:
        buckets: the buckets to choose from.
        height: height of the image in pixels.
        width: width of the image in pixels.
        max_upscale: images that would have to grow by a larger factor are left out.
        max_crop: images that would lose a larger share of their area to the center crop are left out.
    """
    # On a log scale, an image and its transpose are equally far from a bucket and its transpose.
    aspect = math.log(height / width)

    # Ties go to the smaller height, so that the result does not depend on the order of the list.
    bucket = min(buckets, key=lambda b: (abs(math.log(b.height / b.width) - aspect), b.height, b.width))

    # The image is scaled until it covers the bucket; the crop removes what exceeds it along the other axis.
    rows, columns = bucket.height / height, bucket.width / width
    scale = max(rows, columns)
    if scale > max_upscale:
        return TOO_SMALL
    if 1 - min(rows, columns) / scale > max_crop:
        return TOO_CROPPED
    return bucket
