"""Parameters and floating-point operations of the network by formula, without building it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.config import DiTConfig, FusionConfig
from model.fusion import collaborates, reads_time, refiner_size


@dataclass(frozen=True)
class Layer:
    """One linear layer or convolution (`weights`, used for each of `rows` vectors) or bias, gain and the like."""

    part: str
    """`dit` or `refiners` (the whole text side)."""
    weights: int
    """Parameters that multiply each row."""
    others: int
    """Parameters that cost next to nothing: biases and gains."""
    rows: float
    """Vectors per sample that go through."""


def count_parameters(config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int]) -> dict[str, int]:
    """Count the network's parameters.

    Returns:
        `dit`, `refiners` (the text side with its projections) and `total`.
    """
    nothing = [0] * len(text_widths)
    layers = [*_dit(config, 0, 0), *_refiners(config, fusion, text_widths, nothing, nothing)]
    counts = {part: sum(layer.weights + layer.others for layer in layers if layer.part == part) for part in ("dit", "refiners")}
    return {**counts, "total": sum(counts.values())}


def flops_per_sample(
    config: DiTConfig,
    fusion: FusionConfig,
    text_widths: Sequence[int],
    height: int,
    width: int,
    text_tokens: Sequence[int],
    prefix_tokens: Sequence[int] | None = None,
) -> float:
    """Floating-point operations of one sample's forward and backward pass; recomputed activations are not counted.

    6 x weights x vectors that go through them, plus 12 x width x queries x keys for each attention, a multiplication and an
    addition being two operations and a backward pass two forward passes.

    Args:
        config: sizes of the DiT.
        fusion: switches of the text side.
        text_widths: width of each LLM's states.
        height: rows of the latents.
        width: columns of the latents.
        text_tokens: tokens of each LLM, prefix included.
        prefix_tokens: how many of them are prefix; None = none.
    """
    prefix_tokens = prefix_tokens or [0] * len(text_tokens)
    patches = height * width // config.patch**2
    captions = [total - prefix for total, prefix in zip(text_tokens, prefix_tokens, strict=True)]
    layers = [*_dit(config, patches, sum(captions)), *_refiners(config, fusion, text_widths, text_tokens, captions)]
    attention = config.depth * config.width * patches * (patches + sum(captions))
    attention += _refiner_attention(config, fusion, text_tokens, captions)
    return 6.0 * sum(layer.weights * layer.rows for layer in layers) + 12.0 * attention


def _linear(part: str, inputs: int, outputs: int, rows: float) -> Layer:
    return Layer(part, inputs * outputs, outputs, rows)


def _feed_forward(part: str, width: int, mlp_ratio: float, rows: float) -> list[Layer]:
    hidden = int(mlp_ratio * width)
    return [_linear(part, width, hidden, rows), _linear(part, hidden, width, rows)]


def _gains(part: str, *widths: int) -> Layer:
    return Layer(part, 0, sum(widths), 0)


def _dit(config: DiTConfig, patches: int, text_tokens: int) -> Iterator[Layer]:
    width, narrow = config.width, config.width // 4
    patch_values = config.patch**2 * config.channels
    yield _linear("dit", patch_values, width, patches)
    yield _gains("dit", width, narrow)
    yield Layer("dit", 9 * width * narrow, narrow, patches)
    yield Layer("dit", 9 * narrow * width, width, patches)
    yield _linear("dit", config.frequency_width, width, 1)
    yield _linear("dit", width, width, 1)
    for _ in range(config.depth):
        yield _linear("dit", width, 9 * width, 1)
        yield _linear("dit", width, 3 * width, patches)
        yield _linear("dit", width, width, patches)
        yield _linear("dit", width, width, patches)
        yield _linear("dit", width, 2 * width, text_tokens)
        yield _linear("dit", width, width, patches)
        yield _gains("dit", *[width // config.heads] * 4)
        yield from _feed_forward("dit", width, config.mlp_ratio, patches)
    yield _linear("dit", width, 2 * width, 1)
    yield _linear("dit", width, patch_values, patches)


def _refiners(
    config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int], tokens: Sequence[int], captions: Sequence[int]
) -> Iterator[Layer]:
    width, heads = refiner_size(fusion, config)
    refined = captions if fusion.crop == "before" else tokens
    queries_of_llms = _refinements(fusion, refined, captions)
    for states, total, inside, queries_of_blocks in zip(text_widths, tokens, refined, queries_of_llms, strict=True):
        yield _gains("refiners", states, width)
        yield _linear("refiners", states, width, total)
        yield _linear("refiners", width, width, 1)
        yield _linear("refiners", width, width, 1)
        for queries in queries_of_blocks:
            yield _gains("refiners", width, width, width // heads, width // heads)
            yield _linear("refiners", width, 3 * width, inside)
            yield _linear("refiners", width, width, queries)
            yield from _feed_forward("refiners", width, config.mlp_ratio, queries)
            if fusion.gate:
                yield _linear("refiners", width, 2 * width, 1)
    for queries, keys in _collaborations(fusion, refined, captions):
        yield _linear("refiners", width, 6 * width, 1)
        yield _gains("refiners", width, width // heads, width // heads)
        yield _linear("refiners", width, width, queries)
        yield _linear("refiners", width, 2 * width, keys)
        yield _linear("refiners", width, width, queries)
        yield from _feed_forward("refiners", width, config.mlp_ratio, queries)
    if width != config.width:
        yield _linear("refiners", width, config.width, sum(captions))
        yield _linear("refiners", width, config.width, 1)
        if reads_time(fusion, len(text_widths)):
            yield _linear("refiners", config.width, width, 1)


def _refinements(fusion: FusionConfig, refined: Sequence[int], captions: Sequence[int]) -> list[list[int]]:
    """Queries of each block of each token refiner; where no LLM reads another, the last computes the captions alone."""
    if fusion.refiner == "none":
        return [[] for _ in refined]
    last = refined if collaborates(fusion, len(refined)) else captions
    return [[inside] * (fusion.refiner_blocks - 1) + [own] for inside, own in zip(refined, last, strict=True)]


def _collaborations(fusion: FusionConfig, refined: Sequence[int], captions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Queries and keys of each branch of each block of the collaborative refiner; the last computes the captions alone."""
    if collaborates(fusion, len(refined)):
        for block in range(fusion.collaborative_blocks):
            queries = captions if block == fusion.collaborative_blocks - 1 else refined
            yield from ((own, sum(refined) - all_own) for own, all_own in zip(queries, refined, strict=True))


def _refiner_attention(config: DiTConfig, fusion: FusionConfig, tokens: Sequence[int], captions: Sequence[int]) -> int:
    """Width x queries x keys, over all attentions of the refiners."""
    width, _ = refiner_size(fusion, config)
    refined = captions if fusion.crop == "before" else tokens
    own = sum(length * sum(queries) for length, queries in zip(refined, _refinements(fusion, refined, captions), strict=True))
    return width * (own + sum(queries * keys for queries, keys in _collaborations(fusion, refined, captions)))
