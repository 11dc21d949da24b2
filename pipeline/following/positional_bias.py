"""Positional bias (paper A.3, figure 3): how well what a prompt says is drawn, by where in the prompt it is said.

Every prompt gives one score a segment. Its scores are read, linearly, at the same relative positions, so that prompts of all
lengths count at each of them: the curve does not mix its shape with the fact that long prompts are harder. The bands come
from drawing prompts with replacement.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from model.common.errors import UserError
from pipeline.following.scoring import SceneScores

matplotlib.use("Agg")
from matplotlib import pyplot

POSITIONS = 8
"""Points of the curve, from the first segment (0) to the last (1)."""
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`-12.3 [-20.1, -4.5]`, in points of a hundred."""
        return f"{100 * self.mean:+z.1f} [{100 * self.low:+z.1f}, {100 * self.high:+z.1f}]"


@dataclass(frozen=True)
class PositionalBias:
    """The curve of one model on one set of prompts."""

    positions: list[float]
    """Relative position in the prompt, 0 first and 1 last."""
    curve: list[Estimate]
    slope: Estimate
    """Of a straight line through each prompt's scores, per whole prompt; below 0: what is said late is lost."""
    gap: Estimate
    """Score of the last segment minus that of the first."""
    prompts: int
    """With at least two segments."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """The curve's two numbers."""
        return f"last minus first segment {self.gap} points, slope {self.slope} per prompt ({self.prompts} prompts)"


def positional_bias(scores: Sequence[Sequence[float]], seed: int = 0) -> PositionalBias:
    """The curve of segment scores, one list a prompt in the order of mention.

    Raises:
        UserError: no prompt has two segments.
    """
    long = [np.asarray(each, np.float64) for each in scores if len(each) > 1]
    if not long:
        raise UserError("no prompt with two or more segments: a positional curve needs them")
    positions = np.linspace(0, 1, POSITIONS)
    columns = [np.interp(positions, np.linspace(0, 1, len(each)), each) for each in long]
    slopes = [np.polyfit(np.linspace(0, 1, len(each)), each, 1)[0] for each in long]
    table = np.column_stack([columns, slopes, [each[-1] - each[0] for each in long]])  # [prompts, positions + 2]
    estimates = _bootstrap(table, seed)
    return PositionalBias(positions.tolist(), estimates[:POSITIONS], estimates[-2], estimates[-1], len(long))


def _bootstrap(table: np.ndarray, seed: int) -> list[Estimate]:
    """Mean of each column, with the interval between quantiles of the means of resampled rows."""
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(table), np.full(len(table), 1 / len(table)), RESAMPLES) / len(table)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(weights @ table, [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, each)) for each in zip(table.mean(0), low, high, strict=True)]


def scene_segment_scores(scores: SceneScores, images: int = 1) -> list[list[float]]:
    """Share of right claims of each segment, one list a caption; relations belong to no segment and are left out.

    Args:
        scores: of `images` pictures of each prompt, one after another.
        images: pictures a prompt; the mean over them counts.
    """
    table: dict[int, list[list[bool]]] = {}
    for claim in scores.claims:
        rows = table.setdefault(claim.picture // images, [[] for _ in range(claim.length)])
        if claim.attribute != "relation":
            rows[claim.position].append(claim.right)
    return [[float(np.mean(row)) for row in table[prompt]] for prompt in sorted(table)]


def plot_positional_bias(curves: dict[str, PositionalBias], path: Path, what: str = "share of right claims") -> None:
    """Draw the curves of several models with their bands, as the paper's figure 3 does, into a PNG or SVG file."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, bias in curves.items():
        label = f"{name}: last - first {bias.gap}"
        (line,) = axes.plot(bias.positions, [point.mean for point in bias.curve], marker="o", label=label)
        low, high = ([getattr(point, side) for point in bias.curve] for side in ("low", "high"))
        axes.fill_between(bias.positions, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="relative position in the prompt", ylabel=what)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
