"""Prompts of adjective-noun segments about everyday things, to measure positional bias with a VQA model
(paper A.3)."""

from dataclasses import dataclass

import numpy as np

from data_prep.scenes.captions import capitalize, join_words, with_article

ADJECTIVES = [
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "round",
    "square", "oval", "rectangular", "wooden", "metallic", "glass", "leather", "plastic", "fluffy", "rubber",
]  # fmt: skip
NOUNS = [
    "apple", "backpack", "ball", "balloon", "banana", "basket", "bed", "bench", "bicycle", "bird", "boat",
    "book", "bottle", "bowl", "box", "bread", "bus", "cake", "camera", "candle", "car", "cat", "chair",
    "clock", "coat", "cow", "cup", "dog", "door", "dress", "drum", "duck", "fence", "flower", "fork",
    "guitar", "hat", "horse", "house", "jacket", "kettle", "key", "knife", "lamp", "leaf", "mirror", "mug",
    "pencil", "piano", "pillow", "plate", "rabbit", "ring", "rug", "scarf", "sheep", "shirt", "shoe", "sofa",
    "spoon", "stool", "suitcase", "table", "teapot", "tent", "train", "tray", "truck", "umbrella", "vase",
    "violin", "wallet", "watch", "window",
]  # fmt: skip
MAX_SEGMENTS = 8


@dataclass(frozen=True)
class NaturalPrompt:
    """A prompt and its segments, such as `a green bench`, in order."""

    text: str
    segments: tuple[str, ...]


def natural_prompts(count: int, seed: int = 0, segments: int | None = None) -> list[NaturalPrompt]:
    """Return prompts 0 to count - 1 of a seed. No noun or adjective is repeated within a prompt.

    Args:
        count: number of prompts.
        seed: seed of the set.
        segments: segments per prompt; None = 2 to 8 in turn.
    """
    prompts = []
    for index in range(count):
        # a generator per prompt: more prompts leave the first ones as they are
        random = np.random.default_rng([seed, index])
        number = segments or 2 + index % (MAX_SEGMENTS - 1)
        # No word repeats, so that a question about one segment cannot be answered from another.
        nouns = random.choice(NOUNS, number, replace=False).tolist()
        adjectives = random.choice(ADJECTIVES, number, replace=False).tolist()

        parts = [
            with_article(f"{adjective} {noun}") for adjective, noun in zip(adjectives, nouns, strict=True)
        ]
        prompts.append(NaturalPrompt(capitalize(join_words(parts)) + ".", tuple(parts)))

    return prompts
