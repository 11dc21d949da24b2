"""Captions whose words alone do not say what belongs together.

- `negation`: the objects, and one that is not there although its color and its shape are both named.
- `distant`: all objects first, and their colors in another sentence, in another order.
"""

from typing import Literal, get_args

import numpy as np

from data_prep.scenes.captions import (
    SceneCaption,
    capitalize,
    caption_scene,
    counted,
    join_words,
    list_text,
    noun_of,
)
from data_prep.scenes.grammar import COLORS, Scene, Segment

ContrastKind = Literal["negation", "distant"]
CONTRAST_KINDS: tuple[ContrastKind, ...] = get_args(ContrastKind)
FIRST_KEY = 101
"""Last part of the random key of the first kind, far from those of other captions."""


def caption_contrast(scene: Scene, kind: ContrastKind, seed: int, index: int) -> SceneCaption:
    """Return the caption of one kind; equal arguments give equal captions.

    Args:
        scene: the scene to describe.
        kind: of the caption.
        seed: seed of the set of scenes.
        index: index of the scene within the set.

    Returns:
        The caption, with `absent` for a negation. `distant` is a list where two groups have one
        shape, since its second sentence refers to objects by their shapes.
    """
    random = np.random.default_rng([seed, index, FIRST_KEY + CONTRAST_KINDS.index(kind)])
    order = random.permutation(len(scene.segments)).tolist()
    segments = tuple(scene.segments[number] for number in order)
    if kind == "negation":
        absent = _absent(segments, random)
        text = f"{list_text(segments)[:-1]}, but no {absent.colour} {noun_of(absent)}."
        return SceneCaption("list", text, segments, absent=(absent,))

    shapes = [segment.shape for segment in segments]
    if len(set(shapes)) < len(shapes):
        return caption_scene(scene, "list", seed, index)
    return SceneCaption("list", _distant(segments, random), segments)


def _absent(segments: tuple[Segment, ...], random: np.random.Generator) -> Segment:
    """Return an object that is not there: if there is one, the color of a group with the shape of another."""
    there = {(segment.colour, segment.shape) for segment in segments}
    named = [
        Segment(a.colour, b.shape) for a in segments for b in segments if (a.colour, b.shape) not in there
    ]
    shape = segments[0].shape
    others = [Segment(color, shape) for color in COLORS if (color, shape) not in there]
    choices = named or others
    return choices[int(random.integers(len(choices)))]


def _distant(segments: tuple[Segment, ...], random: np.random.Generator) -> str:
    """Return the objects without their colors, and their colors before or behind."""
    nouns = [" ".join(filter(None, (each.size, each.texture, noun_of(each)))) for each in segments]
    named = join_words([counted(each.count, noun) for each, noun in zip(segments, nouns, strict=True)])
    colors = []
    for number in random.permutation(len(segments)).tolist():
        segment = segments[number]
        verb = "is" if segment.count == 1 else "are"
        colors.append(f"the {noun_of(segment)} {verb} {segment.colour}")
    objects = f"There {'is' if segments[0].count == 1 else 'are'} {named}."
    claims = f"{capitalize(join_words(colors))}."
    return f"{objects} {claims}" if random.random() < 0.5 else f"{claims} {objects}"
