"""Captions of a scene in several styles, English and Chinese, with what they claim kept as data beside the text.

The order in which a caption mentions things is drawn for each caption and does not depend on where they lie.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from data_prep.scenes.grammar import (
    Colour,
    Direction,
    Ground,
    Pattern,
    Relation,
    Scene,
    Segment,
    Shape,
    Size,
    Texture,
    Tone,
    sample_scene,
)

CaptionKind = Literal["list", "sentence", "paragraph", "zh"]
CAPTION_KINDS: tuple[CaptionKind, ...] = get_args(CaptionKind)

_NUMBERS = ["no", "one", "two", "three", "four"]
_ORDINARY: dict[Shape, str] = {"cross": "crosses"}
_DIRECTIONS: dict[Direction, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
_ZH_NUMBERS = ["零", "一", "两", "三", "四"]
_ZH_COLOURS: dict[Colour, str] = {
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
_ZH_DIRECTIONS: dict[Direction, str] = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}
_ZH_TONES: dict[Tone, str] = {"white": "白色", "dark grey": "深灰色", "black": "黑色"}
_ZH_PATTERNS: dict[Pattern, str] = {"plain": "纯色", "speckled": "斑点", "lined": "斜线", "checked": "方格"}


@dataclass(frozen=True)
class SceneCaption:
    """A caption and what it claims."""

    kind: CaptionKind
    text: str
    segments: tuple[Segment, ...]
    """In the order in which they are mentioned."""
    relations: tuple[Relation, ...] = ()
    """Their numbers count in that order too."""

    def to_json(self) -> dict[str, Any]:
        """The caption as plain data."""
        return asdict(self)


def caption_scene(scene: Scene, kind: CaptionKind, seed: int, index: int) -> SceneCaption:
    """The caption of one kind; equal arguments give equal captions.

    `list`: the segments and nothing else. `sentence`: the segments, the ground and a relation. `paragraph`: a sentence or two a
    segment, the ground and up to three relations. `zh`: as `sentence`, in Chinese.
    """
    random = np.random.default_rng([seed, index, 1 + CAPTION_KINDS.index(kind)])
    order = random.permutation(len(scene.segments)).tolist()
    segments = tuple(scene.segments[number] for number in order)
    place = {number: position for position, number in enumerate(order)}
    known = [Relation(place[r.subject], r.direction, place[r.other]) for r in scene.relations()]
    most = {"list": 0, "sentence": 1, "paragraph": 3, "zh": 1}[kind]
    relations = _draw_relations(random, known, most)
    write: dict[CaptionKind, Callable[..., str]] = {"list": _list, "sentence": _sentence, "paragraph": _paragraph, "zh": _zh}
    return SceneCaption(kind, write[kind](segments, relations, scene.ground, random), segments, tuple(relations))


def _draw_relations(random: np.random.Generator, known: list[Relation], most: int) -> list[Relation]:
    """At most one relation of two objects, so that none says again what another said."""
    drawn: list[Relation] = []
    for number in random.permutation(len(known)).tolist():
        pairs = [{each.subject, each.other} for each in drawn]
        if len(drawn) < most and {known[number].subject, known[number].other} not in pairs:
            drawn.append(known[number])
    return drawn


# -- English ------------------------------------------------------------------------------------------------------------


def adjectives_and_noun(segment: Segment) -> str:
    """`small green striped triangle`, or in the plural."""
    noun = segment.shape if segment.count == 1 else _ORDINARY.get(segment.shape, f"{segment.shape}s")
    return " ".join(word for word in (segment.size, segment.colour, segment.texture, noun) if word)


def _indefinite(segment: Segment) -> str:
    words = adjectives_and_noun(segment)
    if segment.count > 1:
        return f"{_NUMBERS[segment.count]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _enumerate(words: Sequence[str], last: str = "and") -> str:
    if len(words) < 3:
        return f" {last} ".join(words)
    return f"{', '.join(words[:-1])}, {last} {words[-1]}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _list(segments: Sequence[Segment], relations: object, ground: object, random: object) -> str:
    return _capital(_enumerate([_indefinite(segment) for segment in segments])) + "."


def _relation(relation: Relation, segments: Sequence[Segment]) -> str:
    subject, other = (adjectives_and_noun(segments[number]) for number in (relation.subject, relation.other))
    return f"the {subject} is {_DIRECTIONS[relation.direction]} the {other}"


def _sentence(segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator) -> str:
    begin = ["A picture of ", "There is ", ""][random.integers(3)]
    several = segments[0].count > 1
    if begin == "There is " and several:
        begin = "There are "
    text = f"{begin}{_enumerate([_indefinite(segment) for segment in segments])} on a {ground.pattern} {ground.tone} ground"
    for relation in relations:
        text += f", where {_relation(relation, segments)}"
    return _capital(text) + "."


def _paragraph(segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator) -> str:
    """A segment's colour and shape stand together; its size and texture may follow in a sentence of their own."""
    lines = []
    for number, segment in enumerate(segments):
        one = segment.count == 1
        later = {"size": segment.size, "texture": segment.texture} if random.random() < 0.5 else {}
        bare = Segment(
            segment.colour,
            segment.shape,
            None if later else segment.size,
            None if later else segment.texture,
            segment.count,
        )
        verb = "is" if one else "are"
        begin = [f"There {verb} ", "The picture shows ", "We see ", "It also holds "][random.integers(4 if number else 3)]
        lines.append(f"{begin}{_indefinite(bare)}.")
        if said := [value for value in later.values() if value]:
            lines.append(f"{'It is' if one else 'They are'} {' and '.join(said)}.")
    lines.insert(0 if random.random() < 0.5 else len(lines), f"The ground is {ground.tone} and {ground.pattern}.")
    lines += [_capital(_relation(relation, segments)) + "." for relation in relations]
    return " ".join(lines)


# -- Chinese ------------------------------------------------------------------------------------------------------------


def _zh_name(segment: Segment) -> str:
    texture = _ZH_TEXTURES[segment.texture] if segment.texture else ""
    size = _ZH_SIZES[segment.size] if segment.size else ""
    return f"{_ZH_COLOURS[segment.colour]}{texture}{size}{_ZH_SHAPES[segment.shape]}"


def _zh(segments: Sequence[Segment], relations: Sequence[Relation], ground: Ground, random: np.random.Generator) -> str:
    names = [f"{_ZH_NUMBERS[segment.count]}个{_zh_name(segment)}" for segment in segments]
    together = "和".join(names) if len(names) < 3 else f"{'、'.join(names[:-1])}和{names[-1]}"
    begin = ["画面中有", "图中有", ""][random.integers(3)]
    text = f"{begin}{together}，背景是{_ZH_TONES[ground.tone]}{_ZH_PATTERNS[ground.pattern]}"
    for relation in relations:
        subject, other = (_zh_name(segments[number]) for number in (relation.subject, relation.other))
        text += f"，{subject}在{other}的{_ZH_DIRECTIONS[relation.direction]}"
    return f"{text}。"


# -- prompts ------------------------------------------------------------------------------------------------------------

HELD_OUT_SEED = 20_240_617
"""Seed of scenes to be drawn as a test: give it to no training set."""


@dataclass(frozen=True)
class ScenePrompt:
    """A scene, of which a model is told the caption alone."""

    scene: Scene
    caption: SceneCaption


def scene_prompts(
    count: int, kind: CaptionKind | None = None, aspect: float = 1.0, segments: Sequence[int] = (), seed: int = HELD_OUT_SEED
) -> list[ScenePrompt]:
    """Prompts 0 to count - 1 of a seed.

    Args:
        count: how many.
        kind: of all captions; None = the kinds in turn.
        aspect: width / height of the pictures.
        segments: exactly so many single objects, these numbers in turn; empty = as it comes.
        seed: of the set.
    """
    prompts = []
    for index in range(count):
        scene = sample_scene(seed, index, aspect, segments[index % len(segments)] if segments else None)
        prompts.append(ScenePrompt(scene, caption_scene(scene, kind or CAPTION_KINDS[index % len(CAPTION_KINDS)], seed, index)))
    return prompts
