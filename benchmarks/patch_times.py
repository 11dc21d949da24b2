"""Training step with a time per patch against one time per sample, on the same network in one run.

    python -m benchmarks.patch_times                              # blocks of the 1B preset, two of them
    python -m benchmarks.patch_times --width 384 --depth 4 --heads 6
    python -m benchmarks.patch_times --preset li_dit_1b --batch 32               # on a GPU: 256 px

Three ways to give a network its times: one per sample; a few levels that the patches of a sample share, as
`objective.patch_times` trains; and a modulation of each patch's own, which is the plain way. A step is a
forward and a backward pass without an optimizer, which is the same for all. The three take turns, so that a
noisy machine slows all alike; times are medians over the rounds, and a ratio is the median of the rounds'
ratios. Memory is what the forward pass keeps for the backward pass, without the weights; on a GPU also the
peak.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reporting import at_most, conditions, print_goals
from model.common.dtypes import DTYPES
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.presets import PRESETS
from pipeline.diffusion.objective import make_objective
from pipeline.engine.compile import compile_regions
from pipeline.stage.objective import ObjectiveConfig, PatchTimesConfig

RESULTS = Path(__file__).parent / "results"
GOAL = 1.06
"""Seconds per step of levels / of one time per sample."""
CHANNELS, LLM_WIDTH = 16, 1024
SHARED, LEVELS, EACH = "one time per sample", "levels", "modulation of each patch"


def sizes(options: argparse.Namespace) -> DiTConfig:
    """Sizes of the DiT."""
    if options.preset:
        return PRESETS[options.preset]
    return DiTConfig(depth=options.depth, width=options.width, heads=options.heads, channels=CHANNELS)


def example_conditions(
    options: argparse.Namespace, device: torch.device
) -> tuple[Tensor, dict[str, Condition]]:
    """Return noisy latents, and a batch's condition in each of the three ways."""
    config = ObjectiveConfig(patch_times=PatchTimesConfig("ltg", options.levels))
    objective = make_objective(config, sizes(options).patch_shape)
    shape = (options.batch, CHANNELS, options.side, options.side)

    def normal(stream: str, numbers: Sequence[int]) -> Tensor:
        return torch.randn(options.batch, *numbers, device=device)

    clean, noise = torch.randn(2, *shape, device=device)
    u = torch.rand(options.batch, device=device)
    example = objective.training_example(clean, noise, u, normal)
    assert example.levels is not None
    states = torch.randn(
        options.batch, options.tokens, LLM_WIDTH, device=device, dtype=DTYPES[options.precision]
    )
    mask = torch.ones(options.batch, options.tokens, dtype=torch.bool, device=device)
    texts = [Text(states, mask, 0, padded=False)]
    return example.noisy.to(DTYPES[options.precision]), {
        SHARED: Condition(example.levels.sample_times, texts),
        LEVELS: Condition(example.timesteps, texts, levels=example.levels),
        EACH: Condition(example.timesteps.gather(1, example.levels.places), texts),
    }


def kept_bytes(network: LIDiT, latents: Tensor, condition: Condition) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The output is bound, so that nothing kept is freed, and its address taken again, before the end.
        output = network(latents, condition)
    del output
    return float(sum(kept.values()))


def make_step(
    options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[str], None], Callable[[str], float], list[str]]:
    """Return a step of the network, and the bytes that it keeps, in the way that an argument names; and the
    ways."""
    torch.manual_seed(0)
    fusion = FusionConfig(families=["a"], mode="none", refiner="none")
    network = LIDiT(sizes(options), fusion, [LLM_WIDTH]).to(device, DTYPES[options.precision])
    if options.compile:
        compile_regions(network.blocks)  # type: ignore[arg-type]
    latents, ways = example_conditions(options, device)

    def step(way: str) -> None:
        network(latents, ways[way]).float().square().mean().backward()
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, lambda way: kept_bytes(network, latents, ways[way]), list(ways)


def run(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each round's step, the bytes that it keeps, and on a GPU its peak memory, by
    way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, kept, ways = make_step(options, device)
    results: dict[str, dict[str, list[float]]] = {}
    for way in ways:
        results[way] = {"seconds": [], "kept": [kept(way)], "memory": []}
    for number in range(options.warmup + options.rounds):
        for way in ways:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            step(way)
            seconds = time.perf_counter() - begun
            if number >= options.warmup:
                results[way]["seconds"].append(seconds)
                if device.type == "cuda":
                    results[way]["memory"].append(float(torch.cuda.max_memory_allocated()))
    return results


def report(options: argparse.Namespace, results: dict[str, dict[str, list[float]]]) -> list[str]:
    """Print the table and the line of JSON; return the table."""
    config, base = sizes(options), results[SHARED]["seconds"]
    ratios = {
        way: statistics.median(own / shared for own, shared in zip(result["seconds"], base, strict=True))
        for way, result in results.items()
    }
    lines = [
        "# Training step with a time per patch",
        "",
        f"{conditions()}; {options.precision}, compile {options.compile}; width {config.width}, "
        f"{config.depth} blocks, {config.heads} heads, patch {config.patch}; latents {CHANNELS} x "
        f"{options.side} x {options.side}, {options.tokens} text tokens, {options.batch} samples, "
        f"{options.levels} levels; medians of {options.rounds} rounds.",
        "",
        "| | seconds per step | / one time per sample | kept for the backward pass | peak memory |",
        "|---|---|---|---|---|",
    ]
    for way, result in results.items():
        memory = f"{max(result['memory']) / 2**30:.2f} GiB" if result["memory"] else "not measured"
        seconds = statistics.median(result["seconds"])
        kept = f"{result['kept'][0] / 2**20:.0f} MiB"
        lines.append(f"| {way} | {seconds:.4f} | {ratios[way]:.3f}x | {kept} | {memory} |")

    goals = {"seconds per step, levels / one time per sample": at_most(ratios[LEVELS], GOAL)}
    lines += ["", *(f"{what}: {goal}." for what, goal in goals.items())]
    print("\n".join(lines))
    memory = {way: result["kept"][0] for way, result in results.items()}
    print_goals("patch_times", goals, ratios=ratios, kept_bytes=memory)
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--side", type=int, default=32, help="side of the latents: pixels / 8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32 if cuda else 2)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--warmup", type=int, default=5 if cuda else 2)
    parser.add_argument("--rounds", type=int, default=20 if cuda else 10)
    return parser.parse_args(arguments)


def main() -> None:
    """Entry of `python -m benchmarks.patch_times`."""
    options = parse()
    lines = report(options, run(options))
    name = options.preset or options.width
    (RESULTS / f"patch_times_{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
