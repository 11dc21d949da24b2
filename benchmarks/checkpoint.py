"""Stall of training by a save: our asynchronous save and DeepSpeed's own, in one run on the same engine.

    python -m benchmarks.checkpoint [--processes 2] [--width 512] [--depth 12] [--saves 5] [--folder DIR]

Both save the same state of the same ZeRO-3 engine: fp32 master weights and Adam moments. Ours also saves the
EMA, hashes and calls fsync. Measured is the time that `save` keeps the training thread, plus, for ours, by
how much the steps during the writing are slower than other steps. The two take turns, so that a noisy machine
slows both alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.processes import join_group
from benchmarks.reporting import at_most, conditions, print_goals
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.engine.engine import Engine
from pipeline.engine.processes import exit_process
from pipeline.runtime.distributed import free_port
from pipeline.stage.config import CheckpointConfig, StageConfig

TABLE = Path(__file__).parent / "results" / "checkpoint.md"
GOAL = 0.2
"""Our stall divided by DeepSpeed's."""
LLM_WIDTH, TOKENS, SIDE = 64, 16, 16


def make_engine(options: argparse.Namespace, world: int) -> Engine:
    """Build a LI-DiT under ZeRO-3."""
    stage = StageConfig(name="benchmark", global_batch=world, samples=10**6, ema=[0.999])
    stage.engine.overlap_comm = torch.cuda.is_available()
    stage.engine.reduce_bucket = 10_000_000
    config = DiTConfig(depth=options.depth, width=options.width, heads=8, channels=16)
    torch.manual_seed(0)
    return Engine(lambda: LIDiT(config, FusionConfig(families=["a"], mode="none"), [LLM_WIDTH]), stage, 1)


def train_step(engine: Engine) -> float:
    """Run one training step and return its seconds."""
    begun = time.perf_counter()
    latents = torch.randn(1, 16, SIDE, SIDE, dtype=engine.dtype, device=engine.device)
    mask = torch.ones(1, TOKENS, dtype=torch.bool, device=engine.device)
    text = Text(torch.randn(1, TOKENS, LLM_WIDTH, device=engine.device), mask, 4, padded=False)
    loss = engine(latents, Condition(torch.rand(1, device=engine.device), [text])).float().square().mean()
    engine.backward(loss)
    engine.step(1e-4)
    engine.update_averages(engine.stage.global_batch)

    return time.perf_counter() - begun


def stall(save: Callable[[], object]) -> float:
    """Return the seconds that the slowest rank spends in `save`."""
    dist.barrier()
    begun = time.perf_counter()
    save()
    seconds = torch.tensor(time.perf_counter() - begun)

    if torch.cuda.is_available():
        seconds = seconds.cuda()

    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def measure(rank: int, options: argparse.Namespace, port: int) -> None:
    """Run one process of the benchmark; rank 0 writes the results."""
    join_group(rank, options.processes, port)
    engine = make_engine(options, options.processes)
    folder = Path(options.folder)
    checkpoints = Checkpoints(folder / "ours", CheckpointConfig(keep_last=1))
    plain = [train_step(engine) for _ in range(8)][3:]
    ours, theirs, slower = [], [], []

    for number in range(1, options.saves + 2):
        theirs.append(
            stall(
                lambda tag=number: engine._engine.save_checkpoint(str(folder / "theirs"), tag=f"step_{tag}")
            )
        )

        plain += [train_step(engine) for _ in range(2)]
        ours.append(stall(lambda step=number: checkpoints.save(engine, {}, step, step, wait=False)))
        during = []

        while checkpoints.pending:
            during.append(train_step(engine))
            checkpoints.poll()

        slower.append(sum(during) - len(during) * statistics.median(plain))

    checkpoints.close()
    if rank == 0:
        # The first save of each kind warms up.
        numbers = {"theirs": theirs[1:], "ours": ours[1:], "slower": slower[1:], "step": plain}

        parameters = sum(torch.Size(shape).numel() for shape in engine.master_weights.layout.shapes.values())
        result = {name: statistics.median(seconds) for name, seconds in numbers.items()} | {
            "parameters": parameters
        }
        (folder / "result.json").write_text(json.dumps(result))

    exit_process(0)


def report(options: argparse.Namespace, result: dict[str, float]) -> None:
    """Print the table and the line of JSON, and keep the table."""
    ratio = result["ours"] / result["theirs"]
    with_slowdown = (result["ours"] + max(0.0, result["slower"])) / result["theirs"]
    goals = {"stall of a save / DeepSpeed's": at_most(ratio, GOAL)}
    lines = [
        "# Seconds that training stalls per save",
        "",
        f"`python -m benchmarks.checkpoint --processes {options.processes} --width {options.width} "
        f"--depth {options.depth} --saves {options.saves}`, {conditions()}",
        "",
        f"LI-DiT of {result['parameters'] / 1e6:.0f}M parameters, ZeRO-3, {options.processes} processes; "
        f"medians of {options.saves} saves; a step takes {result['step']:.2f} s.",
        "",
        "| | seconds | of DeepSpeed's |",
        "|---|---|---|",
        f"| DeepSpeed `save_checkpoint` (no average, no hash, no fsync) | {result['theirs']:.3f} | 1.00x |",
        f"| ours, asynchronous: the copy | {result['ours']:.3f} | {ratio:.2f}x |",
        f"| ours: how much longer the steps took during the writing | {result['slower']:.3f} | |",
        f"| ours, both | {result['ours'] + max(0.0, result['slower']):.3f} | {with_slowdown:.2f}x |",
        "",
        f"Goal: the copy at most {GOAL}x: {'met' if ratio <= GOAL else 'missed'}.",
    ]

    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print_goals("checkpoint", goals, with_slowdown=with_slowdown, **result)


def main() -> None:
    """Entry of `python -m benchmarks.checkpoint`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = folder
        spawn(measure, args=(options, free_port()), nprocs=options.processes)
        report(options, json.loads((Path(folder) / "result.json").read_text()))


if __name__ == "__main__":
    main()
