"""Parameters and floating-point operations of the network by formula, without building it."""

import math
from collections.abc import Iterator, Sequence

from model.blocks import BLOCKS
from model.conditions import CONDITIONS
from model.config import DiTConfig, FusionConfig
from model.costs import LayerCost, feed_forward, gains, level_spread, linear
from model.fusion import attended, collaborates, reads_time, refiner_size
from model.video_position import position_costs


def count_parameters(config: DiTConfig, fusion: FusionConfig, text_widths: Sequence[int]) -> dict[str, int]:
    """Count the network's parameters.

    Args:
        config: sizes of the DiT.
        fusion: switches of the text side.
        text_widths: width of each LLM's hidden states.

    Returns:
        `dit`, `refiners` (the text side with its projections) and `total`.
    """
    # The number of rows has no influence on the parameters.
    nothing = [0] * (len(text_widths) - fusion.pooled)
    dit = sum(layer.weights + layer.others for layer in _dit(config, 0, 0))
    text_side = _refiners(config, fusion, text_widths, nothing, nothing)
    refiners = sum(layer.weights + layer.others for layer in text_side)
    return {"dit": dit, "refiners": refiners, "total": dit + refiners}


def flops_per_sample(
    config: DiTConfig,
    fusion: FusionConfig,
    text_widths: Sequence[int],
    latents: Sequence[int],
    text_tokens: Sequence[int],
    prefix_tokens: Sequence[int] | None = None,
) -> float:
    """Return the floating-point operations of one sample's forward and backward pass, without recomputed
    activations.

    6 x weights x vectors that go through them, plus 12 x width x queries x keys for each attention and 6 x
    products of activations, a multiplication and an addition being two operations and a backward pass two
    forward passes.

    Args:
        config: sizes of the DiT.
        fusion: switches of the text side.
        text_widths: width of each LLM's hidden states.
        latents: positions of the latents along each axis, (h, w) or (T, h, w).
        text_tokens: tokens of each LLM, prefix included.
        prefix_tokens: how many of them are prefix; None = none.
    """
    prefix_tokens = prefix_tokens or [0] * len(text_tokens)
    patches = math.prod(latents) // math.prod(config.patch_shape)
    # The refiners read the prefixes as well; the DiT reads the captions alone.
    captions = [total - prefix for total, prefix in zip(text_tokens, prefix_tokens, strict=True)]
    text_tokens, captions = attended(fusion, text_tokens), attended(fusion, captions)

    layers = [
        *_dit(config, patches, sum(captions)),
        *_refiners(config, fusion, text_widths, text_tokens, captions),
    ]
    attention = config.depth * BLOCKS[config.block].attention(config, patches, sum(captions))
    attention += _refiner_attention(config, fusion, text_tokens, captions)
    return 6.0 * sum(layer.weights * layer.rows + layer.products for layer in layers) + 12.0 * attention


def _dit(config: DiTConfig, patches: int, text_tokens: int) -> Iterator[LayerCost]:
    """Yield the DiT's layers in the order in which the network runs them."""
    width = config.width
    yield linear(config.patch_values, width, patches)

    yield from position_costs(config, patches)

    # timestep and further conditions
    times = config.time_levels + (config.time_levels > 1)  # with levels, the text side's time too
    yield linear(config.frequency_width, width, times)
    yield linear(width, width, times)
    for name in config.conditions:
        yield from CONDITIONS[name].costs(config)

    for _ in range(config.depth):
        yield from BLOCKS[config.block].costs(config, patches, text_tokens)

    # last layer
    yield linear(width, 2 * width, config.time_levels)
    yield level_spread(config.time_levels, width, 2, patches)
    yield linear(width, config.patch_values, patches)
    if config.difficulty != "none":
        yield linear(width, 1, patches)


def _refiners(
    config: DiTConfig,
    fusion: FusionConfig,
    text_widths: Sequence[int],
    tokens: Sequence[int],
    captions: Sequence[int],
) -> Iterator[LayerCost]:
    """Yield the layers of the text side."""
    width, heads = refiner_size(fusion, config)
    for states in text_widths[len(text_widths) - fusion.pooled :]:
        yield gains(states)
        yield linear(states, config.width, 1)
        yield linear(config.width, config.width, 1)
    text_widths = attended(fusion, text_widths)
    refined = captions if fusion.crop == "before" else tokens

    queries_of_llms = _refinements(fusion, refined, captions)
    for states, total, inside, queries_of_blocks in zip(
        text_widths, tokens, refined, queries_of_llms, strict=True
    ):
        # projection and pooled text, with the norms before and after the refiners
        yield gains(states, width)
        yield linear(states, width, total)
        if fusion.pool != "none":
            yield linear(width, width, 1)
            yield linear(width, width, 1)
        # token refiner: keys and values of all tokens, the rest for the queries alone
        for queries in queries_of_blocks:
            yield gains(width, width, width // heads, width // heads)
            yield linear(width, 3 * width, inside)
            yield linear(width, width, queries)
            yield from feed_forward(width, config.mlp_ratio, queries)
            if fusion.gate:
                yield linear(width, 2 * width, 1)

    for queries, keys in _collaborations(fusion, refined, captions):
        # collaborative refiner: modulation, norms, attention, feed-forward layer
        yield linear(width, 6 * width, 1)
        yield gains(width, width // heads, width // heads)
        yield linear(width, width, queries)
        yield linear(width, 2 * width, keys)
        yield linear(width, width, queries)
        yield from feed_forward(width, config.mlp_ratio, queries)

    # `TextFusion` has these layers only if the widths differ.
    if width != config.width:
        yield linear(width, config.width, sum(captions))
        if fusion.pool != "none":
            yield linear(width, config.width, 1)
        if reads_time(fusion, len(text_widths)):
            yield linear(config.width, width, 1)


def _refinements(fusion: FusionConfig, refined: Sequence[int], captions: Sequence[int]) -> list[list[int]]:
    """Return the queries of each block of each token refiner.

    Where no LLM reads another, the last block computes the captions alone.
    """
    if fusion.refiner == "none":
        return [[] for _ in refined]
    # A collaborative refiner reads the prefixes too, so the token refiners before it have to keep them.
    last = refined if collaborates(fusion, len(refined)) else captions
    return [[inside] * (fusion.refiner_blocks - 1) + [own] for inside, own in zip(refined, last, strict=True)]


def _collaborations(
    fusion: FusionConfig, refined: Sequence[int], captions: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield queries and keys of each branch of each block of the collaborative refiner.

    The last block computes the captions alone.
    """
    if collaborates(fusion, len(refined)):
        for block in range(fusion.collaborative_blocks):
            queries = captions if block == fusion.collaborative_blocks - 1 else refined
            yield from ((own, sum(refined) - all_own) for own, all_own in zip(queries, refined, strict=True))


def _refiner_attention(
    config: DiTConfig, fusion: FusionConfig, tokens: Sequence[int], captions: Sequence[int]
) -> int:
    """Return width x queries x keys, summed over all attentions of the refiners."""
    width, _ = refiner_size(fusion, config)
    refined = captions if fusion.crop == "before" else tokens
    queries_of_llms = _refinements(fusion, refined, captions)

    own = sum(length * sum(queries) for length, queries in zip(refined, queries_of_llms, strict=True))
    across = sum(queries * keys for queries, keys in _collaborations(fusion, refined, captions))
    return width * (own + across)
