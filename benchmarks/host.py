"""Host work of a training step of LI-DiT-1B's structure: what the processor does while the GPU computes.

    python -m benchmarks.host [--depth 28] [--steps 6]

28 blocks and two LLMs at a width of 16, on one process. Each compiled region is one node of autograd that
computes nothing, as a compiled graph is for the host; the rest runs as it is. What is left is ZeRO-3's hooks,
gathers and reductions, the layers outside of regions, and the step. The sides take turns in one run:

- before: blocks of the DiT are regions, those of the refiners are not; DeepSpeed's step and buckets.
- after: this package.

Times are processor time, the least of the steps, in which nothing else of this machine counts; operations are
those on tensors that are no views, which is about what a GPU would launch outside of compiled graphs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.operations import Operations
from benchmarks.reporting import at_most, conditions, print_goals
from model.block import Block
from model.collaborative_refiner import CollaborativeBranch
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.dit_block import DiTBlock
from model.region import Region
from model.token_refiner import TokenRefinerBlock
from pipeline.engine import buckets, partitioned
from pipeline.engine.engine import Engine
from pipeline.stage.config import StageConfig

RESULTS = Path(__file__).parent / "results"
WIDTH, SAMPLES, TOKENS, PREFIX = 16, 2, 7, 3
PHASES = ("forward", "backward", "step")
WARM_UP = 3
GOAL = 1 / 3
MAX_OPERATIONS = 2_500
"""Operations in a whole step outside of regions: goal."""


class Node(torch.autograd.Function):
    """One node of autograd in the place of a region: its first input comes out, all gradients are zero."""

    @staticmethod
    def forward(ctx: Any, first: int, *inputs: Tensor) -> Tensor:
        """Return the first input from token `first` on."""
        ctx.inputs = [(value.shape, value.dtype) if value.requires_grad else None for value in inputs]
        return inputs[0][:, first:].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return zeros for every input with a gradient."""
        zeros = [None if each is None else torch.zeros(each[0], dtype=each[1]) for each in ctx.inputs]
        return None, *zeros


def one_node(region: Region, *inputs: Any) -> Tensor:
    """Take the place of the compiled forward pass of a region."""
    first = next((value for value in inputs if isinstance(value, int)), 0)
    given = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    return Node.apply(first, *given, *region.parameters())  # type: ignore[return-value]


@contextmanager
def regions_as_nodes(classes: tuple[type[Region], ...]) -> Iterator[None]:
    """Return a context in which the forward passes of some regions are one node each."""
    with ExitStack() as stack:
        for each in classes:
            stack.enter_context(mock.patch.object(each, "forward", one_node))
        yield


def use_deepspeeds_buckets(zero: Any) -> None:
    """Let an optimizer of ZeRO-3 reduce gradients as DeepSpeed does, through a buffer for each bucket."""
    delattr(zero, buckets._AVERAGE)
    del zero.partition_grads
    zero.contiguous_gradients = True
    for dtype, bucket in zero.ipg_buckets.items():
        bucket.buffer = torch.empty(zero.reduce_bucket_size, dtype=dtype)


class Side:
    """One engine, and the regions that are compiled in it."""

    def __init__(self, depth: int, before: bool) -> None:
        """Build the engine; `before` gives the former regions, and DeepSpeed's step and buckets."""
        self.classes = (DiTBlock,) if before else (DiTBlock, TokenRefinerBlock, CollaborativeBranch)
        stage = StageConfig(name="host", global_batch=SAMPLES, samples=10**9, ema=[0.999])
        stage.engine.overlap_comm = False
        stage.engine.reduce_bucket = stage.engine.prefetch_bucket = 10_000_000
        sizes = DiTConfig(depth=depth, width=WIDTH, heads=2, channels=4)
        fusion = FusionConfig(families=["one", "other"])
        leaves = (Block,) if before else partitioned.LEAVES
        torch.manual_seed(0)
        with mock.patch.object(partitioned, "LEAVES", leaves):
            self.engine = Engine(lambda: LIDiT(sizes, fusion, [WIDTH, WIDTH]), stage, SAMPLES)
        if before:
            zero = self.engine._optimizer
            zero.step = type(zero).step.__get__(zero)
            use_deepspeeds_buckets(zero)

    def step(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield the phases of a training step, each to be called before the next."""
        texts = []
        for _ in range(2):
            mask = torch.tensor([[True] * TOKENS, [True] * (TOKENS - 2) + [False] * 2])
            texts.append(Text(torch.randn(SAMPLES, TOKENS, WIDTH, dtype=self.engine.dtype), mask, PREFIX))
        latents = torch.randn(SAMPLES, 4, 4, 4, dtype=self.engine.dtype)
        condition = Condition(torch.rand(SAMPLES), texts)
        outputs: list[Tensor] = []
        yield "forward", lambda: outputs.append(self.engine(latents, condition))
        loss = outputs[0].float().square().mean()
        yield "backward", lambda: self.engine.backward(loss)
        yield "step", lambda: self.engine.step(1e-4)

    def measure(self) -> dict[str, float]:
        """Return the processor seconds of each phase of one step."""
        seconds = {}
        with regions_as_nodes(self.classes):
            for name, run in self.step():
                began = time.process_time()
                run()
                seconds[name] = time.process_time() - began
        return seconds

    def count(self) -> dict[str, int]:
        """Return the operations of each phase of one step."""
        counts = {}
        with regions_as_nodes(self.classes):
            for name, run in self.step():
                with Operations() as operations:
                    run()
                counts[name] = operations.count
        return counts


def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m benchmarks.host`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=28, help="blocks of the DiT")
    parser.add_argument("--steps", type=int, default=6, help="steps of each side that count")
    parser.add_argument("--out", type=Path, default=RESULTS / "host.md")
    options = parser.parse_args(arguments)

    sides = {name: Side(options.depth, before=name == "before") for name in ("before", "after")}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(WARM_UP + options.steps):
        for name, side in sides.items():
            measured[name].append(side.measure())
    least = {
        name: {phase: min(step[phase] for step in steps[WARM_UP:]) for phase in PHASES}
        for name, steps in measured.items()
    }
    counts = {name: side.count() for name, side in sides.items()}

    rows = [
        f"| {phase} | "
        + " | ".join(f"{1e3 * least[name][phase]:.1f} | {counts[name][phase]:,}" for name in sides)
        + " |"
        for phase in PHASES
    ]
    micro = {name: least[name]["forward"] + least[name]["backward"] for name in sides}
    whole = {name: sum(least[name].values()) for name in sides}
    table = [
        "# Host work of a step",
        "",
        conditions(),
        "",
        f"    python -m benchmarks.host --depth {options.depth} --steps {options.steps}",
        "",
        "| | before, ms | operations | after, ms | operations |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    options.out.write_text("\n".join(table))
    print("\n".join(table))
    goals = {
        "micro_step_after_over_before": at_most(micro["after"] / micro["before"], GOAL),
        "whole_step_after_over_before": at_most(whole["after"] / whole["before"], GOAL),
        "step_after_over_before": at_most(least["after"]["step"] / least["before"]["step"], GOAL),
        "operations": at_most(sum(counts["after"].values()), MAX_OPERATIONS),
    }
    print_goals("host", goals)


if __name__ == "__main__":
    main()
