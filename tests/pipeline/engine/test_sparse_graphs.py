"""Blocks with sparse attention are compiled ahead for every grid, with and without a shift."""

import pytest
import torch

from model.attention_config import AttentionConfig
from model.blocks import BLOCKS
from model.config import DiTConfig
from model.region import ExampleSizes, TextLengths
from pipeline.engine.compile import compile_regions, make_graphs
from tests.helpers.trainer_tasks import Compilations

GRIDS = ((8, 8), (8, 12))


@pytest.mark.slow
def test_no_step_makes_a_new_graph(monkeypatch):
    attention = AttentionConfig("block_sparse", block=4, keep=0.4)
    sizes = DiTConfig(depth=2, width=16, heads=2, patch=1, attention=attention)
    blocks = [BLOCKS["dit"](sizes) for _ in range(2)]
    compilations = Compilations()
    monkeypatch.setattr(torch, "compile", compilations.compile)
    torch._dynamo.reset()
    compile_regions(blocks)
    for grid in GRIDS:
        make_graphs(blocks[1], 2, grid)
    made = compilations.forward, compilations.backward
    assert made == (2 * 2 * len(GRIDS),) * 2  # shifted or not, with a mask or without

    for grid in GRIDS:
        for number, block in enumerate(blocks):
            for tokens, padded in ((70, True), (5, False)):
                sizes = ExampleSizes(2, grid, TextLengths(tokens), padded)
                inputs = block.example_inputs(sizes)[number]
                block.forward(*inputs).sum().backward()
    assert (compilations.forward, compilations.backward) == made
