"""A figure of images with their prompts below them, each claim of a prompt marked as right or wrong."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import pyplot
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from numpy.typing import NDArray

from data_prep.scenes.captions import SceneCaption
from pipeline.following.reading import read_scene
from pipeline.following.scoring import Claim, judge_caption

COLUMNS = 6
SIDE = 2.5
"""Width of an image, in inches."""
LINE = 0.17
"""Height of a line of text, in inches."""
LETTERS = 38
"""Letters of a prompt per line."""
RIGHT, WRONG = "#1b7837", "#b2182b"


def claim_lines(caption: SceneCaption, claims: Sequence[Claim]) -> list[list[tuple[str, bool]]]:
    """Return a line per segment, then one per relation: (words, True if right) of each claim.

    A relation names its segments by their place in the caption, from 1.
    """
    lines: list[list[tuple[str, bool]]] = [[] for _ in caption.segments]
    related = iter(caption.relations)
    for claim in claims:
        # claims of relations come last, in the caption's order
        if claim.attribute == "relation":
            relation = next(related)
            words = f"{relation.subject + 1} {relation.direction} {relation.other + 1}"
            lines.append([(words, claim.correct)])
        else:
            segment = caption.segments[claim.position]
            stated = {**segment.stated, "count": f"{segment.count} objects"}
            lines[claim.position].append((stated[claim.attribute], claim.correct))

    return lines


def save_judged_images(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[SceneCaption], path: Path, scale: float = 1.0
) -> None:
    """Judge images by the exact scorer, and draw them with the judgments, to a PNG or SVG file.

    Args:
        images: [H, W, 3].
        captions: one per image.
        path: path of the file.
        scale: size of the scenes' objects.
    """
    texts = [fill(caption.text, LETTERS) for caption in captions]
    marks = []
    for image, caption in zip(images, captions, strict=True):
        marks.append(claim_lines(caption, judge_caption(0, read_scene(image, scale), caption)))

    # the longest prompt decides for all, so that the rows line up
    below = LINE * max(text.count("\n") + 2 + len(lines) for text, lines in zip(texts, marks, strict=True))
    height = SIDE * max(image.shape[0] / image.shape[1] for image in images)
    columns = min(COLUMNS, len(images))
    rows = ceil(len(images) / columns)
    figure = pyplot.figure(figsize=(columns * (SIDE + 0.2), rows * (height + below)))

    for number, (image, text, lines) in enumerate(zip(images, texts, marks, strict=True)):
        row, column = divmod(number, columns)
        bottom = 1 - (row + height / (height + below)) / rows
        axes = figure.add_axes((column / columns, bottom, 0.9 / columns, height / (height + below) / rows))
        axes.imshow(image, interpolation="nearest")
        axes.axis("off")
        prompt = TextArea(text, textprops={"fontsize": 9})
        axes.add_artist(
            AnnotationBbox(
                VPacker(pad=0, sep=3, align="left", children=[prompt, *map(_line, lines)]),
                (0, 0),
                xycoords="axes fraction",
                box_alignment=(0, 1),
                frameon=False,
                pad=0.2,
            )
        )
    figure.savefig(path, dpi=120, facecolor="white")
    # pyplot keeps every figure in memory until it is closed
    pyplot.close(figure)


def _line(claims: Sequence[tuple[str, bool]]) -> HPacker:
    children = []
    for words, correct in claims:
        # the sign too, since not everybody sees the two colors apart
        style = {"color": RIGHT if correct else WRONG, "fontsize": 8}
        children.append(TextArea(f"{'✓' if correct else '✗'} {words}", textprops=style))
    return HPacker(pad=0, sep=6, align="baseline", children=children)
