"""Equal-area aspect-ratio buckets, and which one an image belongs to. Pure functions of integers."""

import math
from typing import Protocol

from data_prep.dataset.schema import Bucket
from model.common.errors import UserError

TOO_SMALL = "bucket: would grow too much"
TOO_CROPPED = "bucket: crop would lose too much"


class BucketSettings(Protocol):
    """The fields of `BucketConfig` that make buckets."""

    resolution: int
    max_aspect: float
    step: int


def make_buckets(config: BucketSettings) -> list[Bucket]:
    """All buckets of about `resolution`^2 pixels with sides in multiples of `step` and an aspect of at most `max_aspect`.

    For every short side the long one is the multiple nearest to equal area, so areas differ by half a step times the short
    side at most. With every bucket its mirror image is there too; the square is always there.

    Raises:
        UserError: the resolution is not a multiple of the step, or the greatest aspect is below 1.
    """
    if config.step < 1 or config.resolution < config.step or config.resolution % config.step:
        raise UserError(
            f"buckets.resolution={config.resolution} is not a multiple of buckets.step={config.step}: change one of them"
        )
    if config.max_aspect < 1:
        raise UserError(f"buckets.max_aspect={config.max_aspect} is below 1: it is long side / short side, so at least 1")
    found = {Bucket(config.resolution, config.resolution)}
    for short in range(config.step, config.resolution, config.step):
        long = round(config.resolution**2 / short / config.step) * config.step
        if short < long <= config.max_aspect * short:
            found |= {Bucket(short, long), Bucket(long, short)}
    return sorted(found, key=lambda bucket: (bucket.height / bucket.width, bucket.height))


def assign(buckets: list[Bucket], height: int, width: int, max_upscale: float, max_crop: float = 1.0) -> Bucket | str:
    """The bucket nearest in aspect ratio (on a log scale) to an image of `height` x `width` pixels, or the reason for none.

    An image is left out if it would have to grow by more than `max_upscale`, or lose more than the share `max_crop` of its
    area to the centre crop.
    """
    aspect = math.log(height / width)
    bucket = min(buckets, key=lambda b: (abs(math.log(b.height / b.width) - aspect), b.height, b.width))
    rows, columns = bucket.height / height, bucket.width / width
    scale = max(rows, columns)
    if scale > max_upscale:
        return TOO_SMALL
    if 1 - min(rows, columns) / scale > max_crop:
        return TOO_CROPPED
    return bucket
