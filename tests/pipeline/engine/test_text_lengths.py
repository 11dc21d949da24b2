"""The warm-up runs every attention of the network at every length of text that training can have."""

import itertools

import pytest

import model.layers
from model.condition import Condition
from model.fusion import prefixes_cut_late, read_prefixes
from model.region import Region
from pipeline.engine.compile import warm_lengths
from tests.helpers.networks import SWITCHES, WIDTHS, random_inputs, random_network, random_text

LENGTHS = (3, 6)
GRID = (2, 3)


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of queries, keys and masks of each call of attention since it was cleared."""
    seen, real = set(), model.layers.attention

    def attention(q, k, v, mask=None, causal=False):
        seen.add((q.shape[:3], k.shape[:3], None if mask is None else mask.shape, causal))
        return real(q, k, v, mask, causal)

    monkeypatch.setattr(model.layers, "attention", attention)
    return seen


@pytest.mark.parametrize("name", SWITCHES)
def test_no_step_has_attention_of_another_shape(name, shapes):
    fusion, llms = SWITCHES[name]
    network, prefixes = random_network(fusion, llms).train(), [llm + 2 for llm in range(llms)]
    cuts, read = prefixes_cut_late(fusion, prefixes), read_prefixes(fusion, prefixes)
    cases = list(itertools.product(LENGTHS, repeat=llms))

    regions = {type(each): each for each in network.modules() if isinstance(each, Region)}
    for region in regions.values():
        for captions in cases:
            warm_lengths(region, 2, GRID, region.text_lengths(captions, read, cuts))
    warmed = set(shapes)
    shapes.clear()

    latents, times, _ = random_inputs(llms, lengths=(1, 1))
    for captions in cases:
        texts = [
            random_text(WIDTHS[llm], (length, 1), prefix=prefixes[llm]) for llm, length in enumerate(captions)
        ]
        network(latents, Condition(times, texts)).sum().backward()
    assert shapes <= warmed
    # Blocks that are the only ones of their refiner never run without a cut.
    assert len(warmed) < 2 * len(shapes) + 2
