"""Positional curves of an ablation (paper A.3, figure 3), with a panel per table."""

import math
from itertools import cycle

import numpy as np

from pipeline.ablation.rows import Ablation, Score
from pipeline.following.positional_bias import PositionalBias, positional_bias
from pipeline.reporting.curves import COLORS, pyplot, style, to_svg

COLUMNS = 2
PANEL = (6.0, 3.6)
"""Width and height of a panel, in inches."""


def positional_biases(scores: dict[str, dict[int, Score]]) -> dict[str, PositionalBias]:
    """Return row -> figure 3's curve; a segment's score is the mean over the seeds.

    Args:
        scores: row -> seed -> results. Rows whose prompts all have one segment have no curve.
    """
    biases: dict[str, PositionalBias] = {}
    for name, records in scores.items():
        by_seed = [record["segments"] for record in records.values()]
        means = [np.mean(segments, axis=0).tolist() for segments in zip(*by_seed, strict=True)]
        # a prompt of one segment has no positions to compare
        if any(len(segments) > 1 for segments in means):
            biases[name] = positional_bias(means)
    return biases


def position_figure(ablation: Ablation, biases: dict[str, PositionalBias]) -> str | None:
    """Draw the curves of each table's rows as an SVG; None if no row of a table has one.

    Bands would hide each other, so the spread over prompts is given by the text beside the figure.

    Args:
        ablation: rows and tables.
        biases: row -> curve.
    """
    panels: dict[str, list[str]] = {}
    for title, names in ablation.tables.items():
        if drawn := [name for name in names if name in biases]:
            panels[title] = drawn
    if not panels:
        return None

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (PANEL[0] * columns, PANEL[1] * rows)
    figure, plots = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for plot in plots.flat[len(panels) :]:
        plot.set_visible(False)
    for plot, (title, names) in zip(plots.flat, panels.items(), strict=False):
        for name, color in zip(names, cycle(COLORS), strict=False):
            shares = [100 * point.mean for point in biases[name].curve]
            plot.plot(
                biases[name].positions, shares, color=color, linewidth=1.6, label=ablation.rows[name].title
            )
        plot.set_title(title, fontsize="medium")
        style(plot)
        plot.legend(frameon=False, fontsize="x-small")
    for plot in plots[:, 0]:
        plot.set_ylabel("right claims of a segment, %")
    for plot in plots[-1]:
        plot.set_xlabel("relative position in the prompt")

    return to_svg(figure)
