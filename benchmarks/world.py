"""Host cost of ZeRO-3's copies around a block's gather and reduction, by the number of processes.

    python -m benchmarks.world

The processes are simulated: tensors without data, so that only the host's work is left. DeepSpeed's loops
over the ranks against ours (`pipeline/engine/world.py`), on the parameters of a block of LI-DiT-1B.
Operations are counted, which gives the same numbers on any machine, and timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from benchmarks.operations import Operations
from benchmarks.reporting import at_most, conditions, print_goals
from model.dit_block import DiTBlock
from model.presets import PRESETS
from pipeline.engine.world import parameters_from_pieces, pieces_by_rank

RESULTS = Path(__file__).parent / "results"
WORLDS = (8, 64, 512)
MAX_GROWTH = 1.5
"""Operations at the largest world, as a multiple of those at the smallest: goal."""


def block_sizes() -> list[int]:
    """Return the elements of each parameter of a block of the 1B network."""
    with torch.device("meta"):
        block = DiTBlock(PRESETS["li_dit_1b"])
    return [prod(parameter.shape) for parameter in block.parameters()]


def loop_of_gather(sizes: list[int], world: int) -> None:
    """Do what DeepSpeed 0.19.8 does after a gather (`AllGatherCoalescedHandle.wait`)."""
    pieces = [-(-size // world) for size in sizes]
    length = sum(pieces)
    buffer = torch.empty(length * world, dtype=torch.bfloat16, device="meta")
    partitions = [buffer.narrow(0, length * rank, length) for rank in range(world)]
    offset = 0
    for size, piece in zip(sizes, pieces, strict=True):
        parts = []
        for rank in range(world):
            if rank * piece < size:
                parts.append(partitions[rank].narrow(0, offset, min(size - rank * piece, piece)))
        torch.cat(parts)
        offset += piece


def loop_of_reduction(sizes: list[int], world: int) -> None:
    """Do what DeepSpeed 0.19.8 does before a reduction (`reduce_scatter_coalesced`)."""
    flats = [torch.empty(size, device="meta") for size in sizes]
    chunks = [-(-size // world) for size in sizes]
    parts = []
    for rank in range(world):
        for flat, chunk in zip(flats, chunks, strict=True):
            part = flat[rank * chunk : (rank + 1) * chunk]
            parts.append(part)
            if chunk > len(part):
                parts.append(torch.empty(chunk - len(part), device="meta"))
    torch.cat(parts)


def our_gather(sizes: list[int], world: int) -> None:
    """Do what ours does after a gather."""
    pieces = [-(-size // world) for size in sizes]
    buffer = torch.empty(world, sum(pieces), dtype=torch.bfloat16, device="meta")
    parameters_from_pieces(buffer, pieces, sizes)


def our_reduction(sizes: list[int], world: int) -> None:
    """Do what ours does before a reduction."""
    pieces_by_rank([torch.empty(size, device="meta") for size in sizes], world)


CASES: dict[str, Callable[[list[int], int], None]] = {
    "gather, DeepSpeed": loop_of_gather,
    "gather, ours": our_gather,
    "reduction, DeepSpeed": loop_of_reduction,
    "reduction, ours": our_reduction,
}


def operations(case: str, world: int) -> int:
    """Return the number of operations of a case."""
    with Operations(views=True) as counted:
        CASES[case](block_sizes(), world)
    return counted.count


def milliseconds(case: str, world: int, repeats: int) -> float:
    """Return the host's time of a case: the median of `repeats`, after one to warm up."""
    sizes, times = block_sizes(), []
    for _ in range(repeats + 1):
        # CPU time of this process, which other processes of a busy machine disturb less.
        began = time.process_time()
        CASES[case](sizes, world)
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[1:])


def main() -> None:
    """Entry of `python -m benchmarks.world`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)

    lines = [
        "# Host cost of a block's gather and reduction, by processes",
        "",
        f"{conditions()}; simulated processes, a block of LI-DiT-1B; medians of {options.repeats}.",
        "",
        "| | " + " | ".join(f"{world} processes" for world in WORLDS) + " |",
        "|---|" + "---|" * len(WORLDS),
    ]
    counts = {}
    for case in CASES:
        cells = []
        for world in WORLDS:
            counts[case, world] = operations(case, world)
            cells.append(
                f"{counts[case, world]:,} operations, {milliseconds(case, world, options.repeats):.2f} ms"
            )
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", "A micro-step of the 1B network has 28 blocks, each with one gather and one reduction."]

    (RESULTS / "world.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    goals = {}
    for name in ("gather", "reduction"):
        growth = counts[f"{name}, ours", WORLDS[-1]] / counts[f"{name}, ours", WORLDS[0]]
        goals[f"operations of a {name} at {WORLDS[-1]} / at {WORLDS[0]}"] = at_most(growth, MAX_GROWTH)
    print_goals("world", goals)


if __name__ == "__main__":
    main()
