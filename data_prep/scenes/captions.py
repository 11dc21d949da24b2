"""Captions of a scene in several styles, in English and Chinese; a caption carries its claims as data next to
the text.

The order in which a caption mentions objects is random per caption and independent of their positions.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from data_prep.scenes.grammar import (
    ANY_STYLE,
    Color,
    Direction,
    Ground,
    Pattern,
    Relation,
    Scene,
    SceneStyle,
    Segment,
    Shape,
    Size,
    Texture,
    Tone,
    combination_of,
    sample_scene,
)
from model.common.errors import UserError

CaptionKind = Literal["list", "sentence", "paragraph", "zh"]
CAPTION_KINDS: tuple[CaptionKind, ...] = get_args(CaptionKind)
MAX_RELATIONS: dict[CaptionKind, int] = {"list": 0, "sentence": 1, "paragraph": 3, "zh": 1}

MAX_TRIALS = 1000
"""Scenes looked at for each prompt of one combination."""

HELD_OUT_SEED = 20_240_617
"""Seed of the scenes that models are tested on. Do not use it for a training set."""

_NUMBERS = ["no", "one", "two", "three", "four"]
_IRREGULAR_PLURALS: dict[Shape, str] = {"cross": "crosses"}
_DIRECTIONS: dict[Direction, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
# Before the measure word 个, two is 两 and not 二.
_ZH_NUMBERS = ["零", "一", "两", "三", "四"]
_ZH_COLORS: dict[Color, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
}
_ZH_SHAPES: dict[Shape, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "cross": "十字形",
    "star": "五角星",
    "heart": "心形",
}
_ZH_SIZES: dict[Size, str] = {"small": "小", "large": "大"}
_ZH_TEXTURES: dict[Texture, str] = {"plain": "纯色", "striped": "条纹", "dotted": "圆点", "checkered": "格子"}
_ZH_DIRECTIONS: dict[Direction, str] = {
    "left of": "左边",
    "right of": "右边",
    "above": "上方",
    "below": "下方",
}
_ZH_TONES: dict[Tone, str] = {"white": "白色", "dark grey": "深灰色", "black": "黑色"}
_ZH_PATTERNS: dict[Pattern, str] = {"plain": "纯色", "speckled": "斑点", "lined": "斜线", "checked": "方格"}


@dataclass(frozen=True)
class SceneCaption:
    """A caption and its claims."""

    kind: CaptionKind
    text: str
    segments: tuple[Segment, ...]
    """In the order in which they are mentioned."""
    relations: tuple[Relation, ...] = ()
    """Their indices refer to `segments`."""
    absent: tuple[Segment, ...] = ()
    """Objects that the caption says are not there."""


@dataclass(frozen=True)
class ScenePrompt:
    """A scene and its caption. A model gets the caption alone."""

    scene: Scene
    caption: SceneCaption


def scene_prompts(
    count: int,
    kind: CaptionKind | None = None,
    aspect: float = 1.0,
    segments: Sequence[int] = (),
    seed: int = HELD_OUT_SEED,
    style: SceneStyle = ANY_STYLE,
    combination: int | None = None,
) -> list[ScenePrompt]:
    """Return the first `count` prompts of a seed.

    Args:
        count: number of prompts.
        kind: caption kind of all prompts; None = all kinds in turn.
        aspect: width / height of the images.
        segments: numbers of single objects, used in turn; empty = random scenes.
        seed: seed of the set of scenes.
        style: that of the scenes of the dataset.
        combination: of each scene, see `combination_of`; None = any.

    Raises:
        UserError: if scenes of this combination are too rare to be found.
    """
    prompts: list[ScenePrompt] = []
    for index in itertools.count():
        if len(prompts) == count:
            break
        if index == MAX_TRIALS * count:
            raise UserError(f"combination {combination}: hardly any scene has it: take 0, or fewer segments")
        groups = segments[index % len(segments)] if segments else None
        scene = sample_scene(seed, index, aspect, groups, style=style)
        if combination not in (None, combination_of(scene)):
            continue

        caption = caption_scene(scene, kind or CAPTION_KINDS[index % len(CAPTION_KINDS)], seed, index)
        prompts.append(ScenePrompt(scene, caption))
    return prompts


def caption_scene(scene: Scene, kind: CaptionKind, seed: int, index: int) -> SceneCaption:
    """Return the caption of one kind; equal arguments give equal captions.

    `list`: the segments and nothing else. `sentence`: the segments, the ground and a relation. `paragraph`:
        one or two
    sentences per segment, the ground and up to three relations. `zh`: like `sentence`, in Chinese.

    Args:
        scene: the scene to describe.
        kind: style of the caption.
        seed: seed of the set of scenes.
        index: index of the scene within the set.
    """
    # The key ends with the kind, since (seed, index) alone is the scene's own.
    random = np.random.default_rng([seed, index, 1 + CAPTION_KINDS.index(kind)])
    order = random.permutation(len(scene.segments)).tolist()
    segments = tuple(scene.segments[number] for number in order)

    # Relations refer to the segments in their new order.
    position = {number: place for place, number in enumerate(order)}
    relations = [
        Relation(position[relation.subject], relation.direction, position[relation.other])
        for relation in scene.relations()
    ]
    stated = _sample_relations(random, relations, MAX_RELATIONS[kind])

    text = _WRITERS[kind](segments, stated, scene.ground, random)
    return SceneCaption(kind, text, segments, tuple(stated))


def _sample_relations(random: np.random.Generator, relations: list[Relation], limit: int) -> list[Relation]:
    """Sample at most `limit` relations, and at most one per pair: its inverse says the same."""
    sampled: list[Relation] = []
    pairs: list[set[int]] = []
    for number in random.permutation(len(relations)).tolist():
        relation = relations[number]
        pair = {relation.subject, relation.other}
        if len(sampled) < limit and pair not in pairs:
            sampled.append(relation)
            pairs.append(pair)
    return sampled


# -- English -------------------------------------------------------------------------------------------------


def adjectives_and_noun(segment: Segment) -> str:
    """Return `small green striped triangle`, or the same in the plural."""
    words = (segment.size, segment.colour, segment.texture, noun_of(segment))
    return " ".join(word for word in words if word)


def noun_of(segment: Segment) -> str:
    """Return `triangle`, or the plural."""
    shape = segment.shape
    return shape if segment.count == 1 else _IRREGULAR_PLURALS.get(shape, f"{shape}s")


def with_article(words: str) -> str:
    """Return the words after `a` or `an`."""
    # The first letter decides, which is right for all words here: none is like `hour` or `unit`.
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def indefinite(segment: Segment) -> str:
    """Return `a small green triangle`, or `two small green triangles`."""
    return counted(segment.count, adjectives_and_noun(segment))


def counted(count: int, words: str) -> str:
    """Return the words after an article or a number."""
    return with_article(words) if count == 1 else f"{_NUMBERS[count]} {words}"


def list_text(segments: Sequence[Segment]) -> str:
    """Return `A red circle and two blue squares.`"""
    return capitalize(join_words([indefinite(segment) for segment in segments])) + "."


def join_words(words: Sequence[str]) -> str:
    """Return `a and b`, or `a, b, and c`."""
    if len(words) < 3:
        return " and ".join(words)
    return f"{', '.join(words[:-1])}, and {words[-1]}"


def capitalize(text: str) -> str:
    """Raise the first letter and leave the others, unlike `str.capitalize`."""
    return text[0].upper() + text[1:]


# All writers have one signature, though a list needs the segments alone.
def _list(segments: Sequence[Segment], relations: object, ground: object, random: object) -> str:
    return list_text(segments)


def _relation(relation: Relation, segments: Sequence[Segment]) -> str:
    # A name is unambiguous: any two groups differ in at least two attributes that are stated for both.
    subject, other = (adjectives_and_noun(segments[number]) for number in (relation.subject, relation.other))
    return f"the {subject} is {_DIRECTIONS[relation.direction]} the {other}"


def _sentence(
    segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator
) -> str:
    start = ["A picture of ", "There is ", ""][random.integers(3)]
    if start == "There is " and segments[0].count > 1:
        start = "There are "

    objects = join_words([indefinite(segment) for segment in segments])
    text = f"{start}{objects} on a {ground.pattern} {ground.tone} ground"
    for relation in relations:
        text += f", where {_relation(relation, segments)}"
    return capitalize(text) + "."


def _paragraph(
    segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator
) -> str:
    """Name color and shape of a segment together; its size and texture may follow in a separate sentence."""
    lines = []
    for number, segment in enumerate(segments):
        single = segment.count == 1
        split = random.random() < 0.5
        first = replace(segment, size=None, texture=None) if split else segment

        verb = "is" if single else "are"
        starts = [f"There {verb} ", "The picture shows ", "We see ", "It also holds "]
        # "also" needs an earlier sentence
        start = starts[random.integers(4 if number else 3)]
        lines.append(f"{start}{indefinite(first)}.")

        adjectives = [word for word in (segment.size, segment.texture) if word]
        if split and adjectives:
            lines.append(f"{'It is' if single else 'They are'} {' and '.join(adjectives)}.")

    # The ground comes first or last.
    lines.insert(
        0 if random.random() < 0.5 else len(lines), f"The ground is {ground.tone} and {ground.pattern}."
    )
    lines += [capitalize(_relation(relation, segments)) + "." for relation in relations]
    return " ".join(lines)


# -- Chinese -------------------------------------------------------------------------------------------------


def zh_name(segment: Segment) -> str:
    """Return color, texture, size and shape in Chinese, as in 绿色条纹小三角形."""
    texture = _ZH_TEXTURES[segment.texture] if segment.texture else ""
    size = _ZH_SIZES[segment.size] if segment.size else ""
    return f"{_ZH_COLORS[segment.colour]}{texture}{size}{_ZH_SHAPES[segment.shape]}"


def zh_ground(ground: Ground) -> str:
    """Return the ground in Chinese, as in 白色纯色."""
    return f"{_ZH_TONES[ground.tone]}{_ZH_PATTERNS[ground.pattern]}"


def _zh(
    segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator
) -> str:
    names = [f"{_ZH_NUMBERS[segment.count]}个{zh_name(segment)}" for segment in segments]
    objects = "和".join(names) if len(names) < 3 else f"{'、'.join(names[:-1])}和{names[-1]}"
    start = ["画面中有", "图中有", ""][random.integers(3)]

    text = f"{start}{objects}，背景是{zh_ground(ground)}"
    for relation in relations:
        subject, other = (zh_name(segments[number]) for number in (relation.subject, relation.other))
        text += f"，{subject}在{other}的{_ZH_DIRECTIONS[relation.direction]}"
    return f"{text}。"


_WRITERS: dict[CaptionKind, Callable[..., str]] = {
    "list": _list,
    "sentence": _sentence,
    "paragraph": _paragraph,
    "zh": _zh,
}
