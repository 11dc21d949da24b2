"""Times that differ from patch to patch (Patch Forcing, arXiv 2604.19141), as levels that patches share.

The paper draws the time of the cleanest patch and then, independently, each patch between it and pure noise:
with t0 the cleanest time, t = 1 - (1 - t0) r, and r from a fixed distribution. Here r takes K values, the
quantiles of that distribution at the middles of K equal parts, and each patch picks one of them. This has the
same distribution of a patch's time up to 1 / K, and the network computes its modulation K times per sample
and not once per patch.
"""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from model.condition import Levels
from pipeline.stage.objective import PatchTimesConfig

STREAM = "patch_times"
"""Name of the random numbers that pick each patch's level."""
_NORMAL = statistics.NormalDist()


def share_below(r: float) -> float:
    """Return the share of patches whose r is below a value in [0, 1].

    r = 1 - |n| / 2 with n a normal number; where that is negative, |n| > 2, it is uniform instead.
    """
    redrawn = 2.0 * (1.0 - _NORMAL.cdf(2.0))
    return 2.0 * (_NORMAL.cdf(2.0) - _NORMAL.cdf(2.0 * (1.0 - r))) + redrawn * r


@functools.cache
def quantiles(levels: int) -> tuple[float, ...]:
    """Return r at the middles of `levels` equal parts of its distribution, rising."""
    found = []
    for level in range(levels):
        wanted, low, high = (level + 0.5) / levels, 0.0, 1.0
        # Bisection, since the inverse has no formula; 60 halvings reach the precision of fp64.
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if share_below(middle) < wanted else (low, middle)
        found.append(high)
    return tuple(found)


def times_of_levels(cleanest: Tensor, levels: int) -> Tensor:
    """Return the times of the levels, fp32 [B, K], falling; none is below that of the cleanest patch [B]."""
    r = torch.tensor(quantiles(levels), device=cleanest.device)
    return 1.0 - (1.0 - cleanest.float())[:, None] * r


def sample_places(normal: Callable[[str, tuple[int]], Tensor], patches: int, levels: int) -> Tensor:
    """Return the level of each patch, uniform, int64 [B, N].

    Args:
        normal: gives normal numbers of each sample, by the name of their purpose.
        patches: of a sample.
        levels: number of levels.
    """
    uniform = torch.special.ndtr(normal(STREAM, (patches,)))
    # The largest normal numbers of fp32 round to 1.
    return (uniform * levels).long().clamp(max=levels - 1)


def make_levels(config: PatchTimesConfig, times: Tensor, places: Tensor) -> Levels:
    """Return the levels as the network reads them, with the time of the text side.

    Args:
        config: settings.
        times: of the levels, [B, K].
        places: level of each patch, [B, N].
    """
    of_patches = times.gather(1, places)
    sample_times = of_patches.mean(dim=1) if config.text_time == "mean" else of_patches.amin(dim=1)
    return Levels(places, sample_times)
