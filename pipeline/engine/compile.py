"""`torch.compile` of the DiT's blocks: a graph for each shape of the latents, whatever the length of the text.

Buckets are a fixed set of shapes, so a graph of its own for each lets the compiler know all sizes but one; the text's length
differs from batch to batch and stays symbolic. Blocks share their graphs. A graph that is missing is made in the step that
needs it, which takes seconds to minutes and keeps the other ranks waiting: so all are made before the first step.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.dit import DiTBlock

_MAX_GRAPHS = 256
"""Of one block; beyond it torch would silently run the block uncompiled. The default, 8, is fewer than the usual buckets."""
_TEXT_TOKENS = (64, 77)
"""Lengths of text to compile with: attention's kernels pad a mask whose length is not a multiple of 16, which is a graph of
its own where it happens."""


def compile_blocks(blocks: Iterable[DiTBlock]) -> None:
    """Compile each block's `forward`, not the block: hooks on it, such as ZeRO-3's, would break the graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for block in blocks:
        _compile(block)


def _compile(block: DiTBlock) -> None:
    compiled = torch.compile(block.forward, dynamic=False)

    def forward(x: Tensor, text: Tensor, text_mask: Tensor | None, c: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(text, 1)
        if text_mask is not None:
            torch._dynamo.maybe_mark_dynamic(text_mask, 3)
        return compiled(x, text, text_mask, c)

    block.forward = forward


def make_graphs(block: DiTBlock, samples: int, patches: int) -> None:
    """Run a compiled block forward and backward on zeros, as training will; nothing is left of it but the graphs.

    Checkpointing needs no others: recomputing runs the same ones.

    Args:
        block: with its parameters whole.
        samples: of a micro-batch.
        patches: of each sample.
    """
    weight = block.mlp.up.weight
    for tokens in _TEXT_TOKENS:
        for mask in (None, weight.new_ones(samples, 1, 1, tokens, dtype=torch.bool)):
            shapes = (samples, patches, weight.shape[1]), (samples, tokens, weight.shape[1]), (samples, weight.shape[1])
            x, text, c = (weight.new_zeros(shape, requires_grad=True) for shape in shapes)
            # unlike `backward` this leaves no gradients in the parameters, and calls none of their hooks
            torch.autograd.grad(block.forward(x, text, mask, c).sum(), (x, text, c))
