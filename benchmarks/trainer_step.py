"""A training step as the trainer runs it, before and after: `python -m benchmarks.train_step --trainer`.

    python -m benchmarks.train_step --trainer [--llm-width 4096]
    python -m benchmarks.train_step --trainer --preset li_dit_1b --batch 256 --micro-batch 64   # on a GPU

Two LLMs, captions of ragged lengths with their prefixes, noise, micro-steps, the step and the averages: all
that a run does but reading. The sizes are those of LI-DiT-1B and of LLMs of 4,096 channels, all divided by
four. One engine takes each batch once per side, in turns, so that a noisy machine slows both alike:

- before: text is padded to the longest caption of the rank's batch and masked; samples are in the batch's
  order.
- after: the trainer's own inputs, whose micro-batches have captions of similar length.
- after, ragged: the same with `engine.ragged_text`, under which refiners, keys and values have no padding.

Times depend on the machine. FLOPs are counted by torch and do not.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_kernels import caption_lengths
from benchmarks.gpu_training import FAMILIES, FUSION, LR, Work, random_batch, random_constants
from benchmarks.processes import join_group
from benchmarks.reporting import at_least, conditions, print_goals
from data_prep.dataset.schema import Family, Snapshot
from model.config import DiTConfig
from model.dit import LIDiT
from model.presets import PRESETS
from pipeline.data.batch import Batch, PackedBatch
from pipeline.engine.engine import Engine
from pipeline.engine.processes import exit_process
from pipeline.runtime.distributed import free_port
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, Source
from pipeline.training.inputs import NetworkInputs
from pipeline.training.micro_batches import MicroBatch
from pipeline.training.passes import Passes

RESULTS = Path(__file__).parent / "results"
BEFORE, AFTER, RAGGED = "before", "after", "after, ragged"
DROPPED = 0.1
"""Share of captions that are the null caption."""
TOKENIZERS = 0.08
"""Standard deviation of the ratio of two LLMs' numbers of tokens for a caption."""
GOAL = 1.3


class PaddedInputs(NetworkInputs):
    """Inputs as they were: every micro-batch is padded to the longest caption of the batch."""

    def micro_batches(self, batch: Batch, parts: Sequence[slice]) -> Iterator[MicroBatch]:
        """Divide a batch into micro-batches in its own order."""
        return (MicroBatch(part) for part in parts)


def caption_tokens(work: Work, seed: int) -> dict[str, list[int]]:
    """Return the tokens of each caption by LLM: long for both or short for both, some of them dropped."""
    lengths = caption_lengths(work.samples, work.longest, seed)

    generator = torch.Generator().manual_seed(seed)

    dropped = (torch.rand(work.samples, generator=generator) < DROPPED).tolist()

    counts = {}
    for family in FAMILIES:
        factors = (1 + TOKENIZERS * torch.randn(work.samples, generator=generator)).tolist()
        counts[family] = []
        for length, factor, drop in zip(lengths, factors, dropped, strict=True):
            own = min(max(round(length * factor), 1), work.longest)
            counts[family].append(0 if drop else own)
    return counts


def work_of(options: argparse.Namespace) -> Work:
    """Return the sizes of the network and of a rank's batch."""
    if options.preset:
        sizes = PRESETS[options.preset]
    else:
        sizes = DiTConfig(depth=options.depth, width=options.width, heads=options.heads)
    return Work(
        sizes,
        options.llm_width,
        options.side,
        options.batch,
        options.micro_batch,
        options.longest,
        options.prefix,
    )


def stage_of(options: argparse.Namespace, work: Work) -> StageConfig:
    """Return a stage with the engine's settings of the 1B stage."""
    cuda = torch.cuda.is_available()

    batch = options.processes * work.samples
    stage = StageConfig(name="benchmark", global_batch=batch, samples=10**9, ema=[0.999], fusion=FUSION)
    stage.engine.micro_batch, stage.engine.precision = work.micro, options.precision
    stage.engine.overlap_comm = cuda
    stage.engine.reduce_bucket = stage.engine.prefetch_bucket = 100_000_000 if cuda else 10_000_000
    stage.engine.max_live_parameters = stage.engine.max_reuse_distance = 2_000_000_000
    stage.model.compile = options.compile
    return stage


class Sides:
    """One network in one engine, which both sides feed."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Build the network, and the inputs of each side."""
        self.work = work_of(options)
        stage = stage_of(options, self.work)

        widths = [self.work.width] * len(FAMILIES)
        self.engine = Engine(lambda: LIDiT(self.work.sizes, FUSION, widths), stage, self.work.samples)

        info = {"channels": self.work.sizes.channels, "scaling_factor": 1.0, "shift_factor": 0.0}
        latents = Family("latents", "latents", {}, info)
        snapshot = Snapshot("benchmark", [], {"latents": latents}, {}, {})
        corpus = Corpus([Source(None, snapshot)])  # type: ignore[arg-type]  # nothing is read
        constants = random_constants(self.engine.device, self.work)

        self.passes: dict[str, Passes] = {}
        ragged = replace(stage, engine=replace(stage.engine, ragged_text=True))
        for name, kind, own in (
            (BEFORE, PaddedInputs, stage),
            (AFTER, NetworkInputs, stage),
            (RAGGED, NetworkInputs, ragged),
        ):
            inputs = kind(own, corpus, constants, self.engine.dtype)
            self.passes[name] = Passes(own, self.work.sizes, self.engine, inputs)
        self.done, self.losses = 0, 0.0

    def batch(self, seed: int) -> PackedBatch:
        """Return a batch as a loader hands it over."""
        return random_batch(self.work, seed, caption_tokens(self.work, seed))

    def step(self, side: str, packed: PackedBatch) -> tuple[float, float]:
        """Train on a batch; return the seconds, and the mean loss of this rank."""
        began = time.perf_counter()
        self.losses = 0.0

        batch = packed.unpack(self.engine.device)
        self.passes[side].run(batch, self._add_losses)
        self.engine.step(LR)
        self.done += 1
        self.engine.update_averages(self.done * self.engine.stage.global_batch)

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began, float(self.losses) / self.work.samples

    def _add_losses(self, batch: Batch, losses: Tensor, timesteps: Tensor, part: str) -> None:
        self.losses = self.losses + losses.sum()

    def flops(self, side: str, packed: PackedBatch) -> float:
        """Return the FLOPs of matrix products and attention of a step per sample, those of padding too."""
        with FlopCounterMode(display=False) as counter:
            self.passes[side].run(packed.unpack(self.engine.device), self._add_losses)

        self.engine.step(LR)
        return counter.get_total_flops() / self.work.samples


def run_process(rank: int, options: argparse.Namespace, port: int, result: str) -> None:
    """Run one process of the benchmark; rank 0 writes what `measure` returns."""
    join_group(rank, options.processes, port)
    found = measure(options, rank)
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    exit_process(0)


def measure(options: argparse.Namespace, rank: int = 0) -> dict[str, Any]:
    """Return seconds, losses and FLOPs by side, on one of the processes."""
    torch.manual_seed(0)
    sides = Sides(options)

    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in sides.passes}
    for number in range(options.warmup + options.steps):
        # Other captions for each rank and step.
        packed = sides.batch(1000 * rank + number)
        for name, figures in found.items():
            seconds, loss = sides.step(name, packed)
            if number >= options.warmup:
                figures["seconds"].append(seconds)
                figures["losses"].append(loss)

    packed = sides.batch(1000 * rank)
    tokens = [sum(counts) / len(counts) for counts in packed.counts.values()]
    for name, figures in found.items():
        figures["flops"] = sides.flops(name, packed)
    return {"sides": found, "tokens": tokens, "useful": sides.work.flops(statistics.mean(tokens))}


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the table and the line of JSON, and keep the table."""
    work = work_of(options)
    sides = found["sides"]

    samples = options.processes * work.samples
    speeds = {name: samples / statistics.median(figures["seconds"]) for name, figures in sides.items()}
    tokens = " and ".join(f"{mean:.0f}" for mean in found["tokens"])
    lines = [
        "# Training step as the trainer runs it, before and after",
        "",
        f"{conditions()}; {options.processes} processes, {options.precision}; width {work.sizes.width}, "
        f"{work.sizes.depth} blocks, {work.sizes.heads} heads; two LLMs of {work.width} channels, captions "
        f"of {tokens} tokens on average and at most {work.longest} after a prefix of {work.prefix}; latents "
        f"{work.sizes.channels} x {work.side} x {work.side}; {work.samples} samples per process in "
        f"micro-batches of {work.micro}; medians of {options.steps} steps.",
        "",
        "| | samples/s | to before | FLOPs per sample | to before |",
        "|---|---|---|---|---|",
    ]
    for name, figures in sides.items():
        speed, flops = speeds[name] / speeds[BEFORE], figures["flops"] / sides[BEFORE]["flops"]
        cells = [f"{speeds[name]:.2f}", f"{speed:.2f}x", f"{figures['flops'] / 1e9:.2f} G", f"{flops:.2f}x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    goals = {}
    for name in (AFTER, RAGGED):
        goals[f"samples/s, {name} / before"] = at_least(speeds[name] / speeds[BEFORE], GOAL)
    lines += [
        "",
        f"The formula's FLOPs per sample without padding: {found['useful'] / 1e9:.2f} G.",
        "",
        *(f"{what}: {goal}." for what, goal in goals.items()),
    ]
    if not torch.cuda.is_available():
        lines.append("Not measured on a GPU.")

    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    flops = {name: figures["flops"] for name, figures in sides.items()}
    print_goals("trainer_step", goals, flops_per_sample=flops, samples_per_second=speeds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--llm-width", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--side", type=int, default=32, help="side of the latents: pixels / 8")
    parser.add_argument("--longest", type=int, default=256, help="most tokens of a caption")
    parser.add_argument("--prefix", type=int, default=40, help="tokens before a caption")
    parser.add_argument("--batch", type=int, default=256 if cuda else 16, help="samples per process")
    parser.add_argument("--micro-batch", type=int, default=64 if cuda else 4)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1)
    parser.add_argument("--steps", type=int, default=20 if cuda else 6)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, which take seconds")
    parser.add_argument("--out", type=Path, default=RESULTS / "trainer_step.md")
    options = parser.parse_args(arguments)
    if options.tiny:
        tiny = {"width": 32, "depth": 1, "heads": 2, "llm_width": 48, "side": 8, "longest": 32, "prefix": 2}
        vars(options).update(tiny, processes=1, batch=8, micro_batch=2, warmup=0, steps=1, compile=False)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m benchmarks.train_step --trainer`."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        spawn(run_process, args=(options, free_port(), str(path)), nprocs=options.processes)
        found = json.loads(path.read_text())
    report(options, found)
