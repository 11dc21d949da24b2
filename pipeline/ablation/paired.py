"""Compare two rows over equal prompts and seeds: the difference of their scores, with an interval over both.

Rows share prompts and seeds, so each prompt of each seed has one difference, and what makes a prompt hard for
both rows cancels out. The interval has to hold for other seeds and for other prompts. It is that of a
bootstrap which resamples both on their own (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics
2007), with the mean of the seeds widened as Student's t widens a normal interval: there are few seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

RESAMPLES = 4000
CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2

Segments = Sequence[Sequence[float]]
"""Share of right claims of each segment of each prompt."""


@dataclass(frozen=True)
class Spread:
    """Variances of a difference of one prompt and seed."""

    seeds: float
    """Between seeds, whatever the prompt."""
    prompts: float
    """Between prompts, whatever the seed."""
    rest: float
    """Variance of what is left, within a prompt and within a seed."""

    def half_width(self, seeds: int, prompts: int) -> float:
        """Return the half width to expect of the interval with other numbers of seeds and prompts.

        Args:
            seeds: at least 2.
            prompts: at least 2.
        """
        wider = _widening(seeds)
        of_seeds = wider**2 * self.seeds / seeds
        variance = of_seeds + self.prompts / prompts + self.rest / (seeds * prompts)
        return float(norm.ppf(1 - TAIL)) * math.sqrt(variance)

    def seeds_for(self, half: float, prompts: int, most: int = 100) -> int | None:
        """Return the number of seeds that makes the interval this narrow; None if `most` are too few."""
        return next((count for count in range(2, most + 1) if self.half_width(count, prompts) <= half), None)


@dataclass(frozen=True)
class Difference:
    """Mean difference of two rows, with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int
    prompts: int
    spread: Spread | None
    """None with a single seed, whose interval is infinite."""

    @property
    def decided(self) -> bool:
        """True if the interval does not contain zero."""
        return not self.low <= 0.0 <= self.high

    def __str__(self) -> str:
        """`+2.1 [+0.3, +3.9]`, in percentage points."""
        # `z` writes a rounded -0.0 as +0.0.
        if math.isinf(self.high):
            return f"{100 * self.mean:+z.1f}"
        return f"{100 * self.mean:+z.1f} [{100 * self.low:+z.1f}, {100 * self.high:+z.1f}]"


def paired_difference(better: Mapping[int, Segments], worse: Mapping[int, Segments]) -> Difference | None:
    """Return the difference of two rows over the seeds that both have; None without any.

    Args:
        better: seed -> segments of the row that is expected to be above.
        worse: those of the other, of the same prompts.

    Raises:
        ValueError: if the prompts have other numbers of segments.
    """
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None
    table = np.stack([prompt_scores(better[seed]) - prompt_scores(worse[seed]) for seed in seeds])
    return difference(table)


def prompt_scores(segments: Segments) -> np.ndarray:
    """Return one score per prompt fp64 [P], whose mean is the mean over all segments.

    A prompt of many segments therefore counts for more.
    """
    total = sum(len(prompt) for prompt in segments)
    return np.array([sum(prompt) for prompt in segments]) * (len(segments) / total)


def difference(table: np.ndarray, seed: int = 0) -> Difference:
    """Return the mean of a table, with its interval.

    Args:
        table: [S, P], a difference per seed and prompt.
        seed: of the bootstrap.
    """
    seeds, prompts = table.shape
    mean = float(table.mean())
    if seeds < 2 or prompts < 2:
        return Difference(mean, -math.inf, math.inf, seeds, prompts, None)

    of_seeds = table.mean(1) - mean
    rest = table - table.mean(1, keepdims=True)

    # Rows of weights that sum to 1: two matrix products give the means of all resamples.
    random = np.random.default_rng(seed)
    rows = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = random.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts
    # Resampling S values gives (S - 1) / S of their variance.
    wider = _widening(seeds) * math.sqrt(seeds / (seeds - 1))
    means = mean + wider * (rows @ of_seeds) + ((rows @ rest) * columns).sum(1)

    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return Difference(mean, float(low), float(high), seeds, prompts, spread(table))


def spread(table: np.ndarray) -> Spread:
    """Return the variances of a table [S, P] of at least 2 x 2, by the two-way analysis of variance."""
    seeds, prompts = table.shape
    of_seeds, of_prompts = table.mean(1), table.mean(0)
    rest = table - of_seeds[:, None] - of_prompts[None] + table.mean()
    residual = float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))

    # An estimate below zero is that of a variance too small to be seen.
    return Spread(
        seeds=max(0.0, float(of_seeds.var(ddof=1)) - residual / prompts),
        prompts=max(0.0, float(of_prompts.var(ddof=1)) - residual / seeds),
        rest=residual,
    )


def _widening(seeds: int) -> float:
    """Return by how much Student's t interval of some values is wider than the normal one."""
    return float(student.ppf(1 - TAIL, seeds - 1) / norm.ppf(1 - TAIL))
