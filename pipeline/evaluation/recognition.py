"""Recognition: the share of generated images whose nearest training image is the caption's own.

It judges a small run without another network. An image that looks like nothing is nearest to some training
image too, but seldom to its own: by chance, once in as many times as there are training images.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_QUANTILE = 1.96
"""Standard deviations on both sides of the mean that contain 95 % of a normal distribution."""


@dataclass(frozen=True)
class Recognition:
    """The result over many images."""

    share: float
    """Share of images that are recognized, in [0, 1]."""
    low: float
    """Lower end of the share's 95 % interval."""
    high: float
    """Upper end of it."""
    chance: float
    """Share of images that would be recognized if each were nearest to a random training image."""
    images: int
    references: int
    """Number of training images that each image is compared with."""


def distances(images: Tensor, references: Tensor) -> Tensor:
    """Return the Euclidean distances of features [B, ...] to features [N, ...]: fp32 [B, N].

    Differences are squared one by one. The faster form by a product of matrices rounds equal references
    differently, so they would not tie.
    """
    flat, others = images.flatten(1).float(), references.flatten(1).float()
    return torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist")


def recognized(distance: Tensor, own: Tensor) -> Tensor:
    """Return how far each image is recognized: fp64 [B] in [0, 1].

    1 if the nearest reference is one of the image's own, 0 if not. If several references are equally near, it
    is the share of them that are its own, so that an image that is equally near to all scores like chance.

    Args:
        distance: [B, N], from images to references.
        own: bool [B, N], the references that have the image's caption.

    Raises:
        ValueError: if an image has no reference of its own.
    """
    if not own.any(dim=1).all():
        raise ValueError("an image has no reference of its own, so it could not be recognized")
    nearest = distance == distance.min(dim=1, keepdim=True).values
    return (nearest & own).sum(1).double() / nearest.sum(1)


def recognition(images: Tensor, references: Tensor, own: Tensor) -> Recognition:
    """Return the recognition of images by their nearest references.

    Args:
        images: features [B, ...], such as pixels or latents.
        references: features [N, ...] of the training images.
        own: bool [B, N], the references that have the image's caption.
    """
    scores = recognized(distances(images, references), own)
    share = float(scores.mean())
    low, high = share_interval(share, len(scores))
    chance = float(own.double().mean())
    return Recognition(share, low, high, chance, len(images), len(references))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` trials (Wilson 1927), which is right for few trials and
    for shares near 0 or 1 too."""
    z2 = NORMAL_QUANTILE**2 / count
    center = (share + z2 / 2) / (1 + z2)
    half = NORMAL_QUANTILE * math.sqrt((share * (1 - share) + z2 / 4) / count) / (1 + z2)
    return max(0.0, center - half), min(1.0, center + half)
