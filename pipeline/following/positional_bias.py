"""Positional bias (paper A.3, figure 3): how well an image follows a segment, by the segment's position in
the prompt.

Every prompt has one score per segment. All scores are interpolated linearly at the same relative positions,
so prompts of all lengths contribute to every point, and the curve is not distorted by long prompts being
harder. The confidence bands are bootstrapped over prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from model.common.errors import UserError
from pipeline.following.scoring import OF_NO_SEGMENT, SceneScores

# Before pyplot is imported: the default backend may need a display.
matplotlib.use("Agg")
from matplotlib import pyplot

POSITIONS = 8
"""Number of points of the curve, from the first segment (0) to the last (1)."""
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class BootstrapMean:
    """A mean over prompts with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`-12.3 [-20.1, -4.5]`, in percentage points."""
        # `z` writes a rounded -0.0 as +0.0.
        return f"{100 * self.mean:+z.1f} [{100 * self.low:+z.1f}, {100 * self.high:+z.1f}]"


@dataclass(frozen=True)
class PositionalBias:
    """The curve of one model on one set of prompts."""

    positions: list[float]
    """Relative position in the prompt: 0 is the first segment and 1 the last."""
    curve: list[BootstrapMean]
    slope: BootstrapMean
    """Slope of a line through each prompt's scores, per whole prompt. Below 0, late segments are followed
    less well."""
    gap: BootstrapMean
    """Score of the last segment minus that of the first."""
    prompts: int
    """Number of prompts with at least two segments."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"last minus first segment {self.gap} points, slope {self.slope} per prompt "
            f"({self.prompts} prompts)"
        )


def positional_bias(scores: Sequence[Sequence[float]], seed: int = 0) -> PositionalBias:
    """Return the curve of segment scores.

    Args:
        scores: one list per prompt, in the order of mention. Prompts of one segment are left out.
        seed: seed of the bootstrap.

    Raises:
        UserError: if no prompt has two segments.
    """
    rows: list[np.ndarray] = []
    positions = np.linspace(0, 1, POSITIONS)
    for segment_scores in scores:
        if len(segment_scores) < 2:
            continue
        values = np.asarray(segment_scores, np.float64)
        places = np.linspace(0, 1, len(values))
        slope = np.polyfit(places, values, 1)[0]
        rows.append(np.array([*np.interp(positions, places, values), slope, values[-1] - values[0]]))
    if not rows:
        raise UserError("no prompt with two or more segments: a positional curve needs them")

    # Curve, slope and gap are columns of one table, so all use the same resamples.
    means = _bootstrap(np.stack(rows), seed)

    return PositionalBias(positions.tolist(), means[:POSITIONS], means[-2], means[-1], len(rows))


def _bootstrap(table: np.ndarray, seed: int) -> list[BootstrapMean]:
    """Return the mean of each column, with the interval between quantiles of the means of resampled rows."""
    # Row weights of a resample are its counts: one matrix product gives the means of all resamples.
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(table), np.full(len(table), 1 / len(table)), RESAMPLES) / len(table)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(weights @ table, [tail, 1 - tail], axis=0)
    return [BootstrapMean(*map(float, column)) for column in zip(table.mean(0), low, high, strict=True)]


def scene_segment_scores(scores: SceneScores, images: int = 1) -> list[list[float]]:
    """Return the share of correct claims of each segment, one list per prompt.

    Relations and what is absent are left out, since they belong to no single segment.

    Args:
        scores: scores of `images` images of each prompt, one after another.
        images: number of images per prompt; their claims are averaged.
    """
    # Every segment has claims, since its color and shape are always stated.
    prompts: dict[int, list[list[bool]]] = {}
    for claim in scores.claims:
        segments = prompts.setdefault(claim.image // images, [[] for _ in range(claim.length)])
        if claim.attribute not in OF_NO_SEGMENT:
            segments[claim.position].append(claim.correct)

    shares: list[list[float]] = []
    for prompt in sorted(prompts):
        shares.append([float(np.mean(judgments)) for judgments in prompts[prompt]])

    return shares


def plot_positional_bias(curves: dict[str, PositionalBias], path: Path, ylabel: str) -> None:
    """Plot the curves of several models with their bands, like figure 3 of the paper, to a PNG or SVG file.

    Args:
        curves: model -> curve.
        path: path of the file.
        ylabel: label of the vertical axis.
    """
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, bias in curves.items():
        label = f"{name}: last - first {bias.gap}"
        (line,) = axes.plot(bias.positions, [point.mean for point in bias.curve], marker="o", label=label)
        low, high = [point.low for point in bias.curve], [point.high for point in bias.curve]
        axes.fill_between(bias.positions, low, high, alpha=0.2, color=line.get_color(), linewidth=0)

    axes.set(xlabel="relative position in the prompt", ylabel=ylabel)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    # pyplot keeps every figure in memory until it is closed.
    pyplot.close(figure)
