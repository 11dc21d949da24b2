"""`torch.compile` of the blocks of DiT and refiners: a graph for each shape of the latents, whatever the
length of the text.

Buckets are a fixed set of shapes, so a graph of its own for each lets the compiler know all sizes but one;
the text's length differs from batch to batch and stays symbolic. Blocks share their graphs. A graph that is
missing is made in the step that needs it, which takes seconds to minutes while the other ranks wait: so all
are made before the first step.
"""

import itertools
import os
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from model.common.errors import UserError
from model.ragged import Rows
from model.region import ExampleSizes, Region, TextLengths, allow_graphs

_TEXT_TOKENS = (64, 77)
"""Lengths of text to compile with: attention's kernels pad a mask whose length is not a multiple of 16, which
makes a different graph."""


def compile_regions(regions: Iterable[Region], budget: float = 1.0) -> None:
    """Compile each region's `forward`, not the region: hooks on it, such as ZeRO-3's, would break the graph.

    Args:
        regions: the blocks of DiT and refiners.
        budget: `model.activation_memory_budget`.

    Raises:
        UserError: if this machine has no GPU and lacks what torch compiles with on the CPU.
    """
    if not torch.cuda.is_available():
        _check_compiler()
    functorch.activation_memory_budget = budget
    allow_graphs()
    for region in regions:
        _compile(region)


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    lacking = ""
    if shutil.which(compiler) is None:
        lacking = f"{compiler} not found: apt-get install g++"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking = "Python.h not found: apt-get install python3-dev"
    if lacking:
        raise UserError(
            f"model.compile=true needs a C++ compiler on a machine without a GPU, and {lacking}, or set "
            "model.compile=false"
        )


def _compile(region: Any) -> None:
    # `dynamic=False`: torch would otherwise make sizes symbolic as soon as a second bucket comes.
    compiled = torch.compile(region.forward, dynamic=False)

    def forward(*inputs: Any) -> Tensor:
        for argument, axis in region.text_axes.items():
            _mark_length(inputs[argument] if argument < len(inputs) else None, axis)
        return compiled(*inputs)

    region.forward = forward


def _mark_length(value: Any, axis: int) -> None:
    """Let the length of a text stay symbolic: of a tensor along an axis, or of rows of tokens."""
    marked: list[tuple[Tensor, int]] = []
    if isinstance(value, Rows):
        marked = [(value.owner, 0), (value.place, 0), (value.shown, 3)]
    elif value is not None:
        marked = [(value, axis)]

    for tensor, own in marked:
        # On every call, because the mark belongs to the tensor. `maybe` lets a graph that needs a fixed
        # length have it.
        torch._dynamo.maybe_mark_dynamic(tensor, own)


def make_graphs(
    region: Region,
    samples: int,
    grid: Sequence[int],
    prefixes: Sequence[int] = (),
    ragged: bool = False,
) -> None:
    """Run a compiled region forward and backward on zeros, as training will; only the graphs remain.

    Checkpointing needs no others: recomputing runs the same ones.

    Args:
        region: with its parameters whole.
        samples: samples of a micro-batch.
        grid: patches of each sample along each axis.
        prefixes: lengths of the LLMs' prefixes that a token refiner cuts off.
        ragged: True if training reads text without padding.
    """
    cut = (0, *prefixes) if region.cuts_prefix else (0,)
    # A batch without padding has no mask, which is another graph; ragged text has none at all.
    kinds = (True,) if ragged else (False, True)
    for tokens, padded, prefix in itertools.product(_TEXT_TOKENS, kinds, cut):
        _run(region, ExampleSizes(samples, tuple(grid), TextLengths(tokens, prefix), padded, ragged))


def warm_lengths(
    region: Region, samples: int, grid: Sequence[int], lengths: Iterable[TextLengths], ragged: bool = False
) -> None:
    """Run a compiled region at lengths of text, as `make_graphs` does: cuDNN plans its kernels for each, for
    a third of a second. Text is padded; a micro-batch of captions that all are of one such length is rare.

    Args:
        region: with its parameters whole.
        samples: samples of a micro-batch.
        grid: patches of each sample along each axis.
        lengths: of the text.
        ragged: True if training reads text without padding.
    """
    for text in sorted(lengths):
        _run(region, ExampleSizes(samples, tuple(grid), text, ragged=ragged))


def _run(region: Region, sizes: ExampleSizes) -> None:
    for inputs in region.example_inputs(sizes):
        trained = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        # Unlike `backward` this leaves no gradients in the parameters, and calls none of their hooks.
        torch.autograd.grad(region.forward(*inputs).sum(), trained)
