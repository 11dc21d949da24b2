"""Captions that the benchmarks encode: Unicode's CLDR names, and dense captions made from a seed."""

import random

import emoji

_COLOURS = [
    "crimson",
    "pale blue",
    "olive green",
    "off-white",
    "rust-coloured",
    "deep purple",
    "golden",
    "charcoal",
]
_MATERIALS = [
    "brushed steel",
    "weathered oak",
    "hammered copper",
    "frosted glass",
    "woven straw",
    "cracked leather",
    "marble",
]
_THINGS = [
    "teapot",
    "bicycle",
    "lighthouse",
    "typewriter",
    "umbrella",
    "accordion",
    "sailing boat",
    "bookshelf",
    "lantern",
]
_PLACES = [
    "to the left of",
    "half hidden behind",
    "resting on top of",
    "in the foreground, just below",
    "leaning against",
]
_LIGHT = [
    "Soft morning light falls from the left",
    "A single lamp throws long shadows",
    "The scene is lit by a low sun",
]


def short_captions(count: int, language: str = "en") -> list[str]:
    """CLDR names of emoji, without the skin tones."""
    if language != "en":
        emoji.config.load_language(language)
    names = (
        data[language].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values() if language in data
    )
    plain = list(dict.fromkeys(name for name in names if "skin tone" not in name and "肤色" not in name))
    return random.Random(0).sample(plain, min(count, len(plain)))


def dense_captions(count: int) -> list[str]:
    """Descriptions of several sentences, 70 to 150 tokens each with the tokenizers tried here."""
    rng = random.Random(1)
    return [_describe(rng, sentences=rng.randint(1, 3)) for _ in range(count)]


def _describe(rng: random.Random, sentences: int) -> str:
    parts = [
        f"A photograph of {_thing(rng)} and {_thing(rng)} in a quiet room with a {rng.choice(_COLOURS)} wall."
    ]
    for _ in range(sentences):
        thing, place = _thing(rng).capitalize(), rng.choice(_PLACES)
        parts.append(f"{thing} stands {place} {_thing(rng)}, {rng.randint(2, 9)} in number.")

    parts.append(
        f"{rng.choice(_LIGHT)}, and a sign reads “{rng.choice(_THINGS).upper()} {rng.randint(10, 99)}”."
    )
    return " ".join(parts)


def _thing(rng: random.Random) -> str:
    return f"a {rng.choice(_COLOURS)} {rng.choice(_THINGS)} made of {rng.choice(_MATERIALS)}"
