"""Estimate what a stage needs: parameters, FLOPs, memory per GPU, speed, days, store.

    python -m pipeline.estimate li_dit_1b_256 --gpus 8,64,512 [--mfu 0.5] [--resolution 256] [--widths
    4096,4096] [key=value ...]

All of it is arithmetic on the settings (`pipeline/operations/planning.py`).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from model.common.errors import command
from model.encoders.latent_spaces import encodes_clips
from pipeline.operations.elastic_planning import PartCost
from pipeline.operations.planning import Setup, activation_bytes, make_plan, most_users
from pipeline.stage.config import StageConfig, load_stage


def show(stage: StageConfig, setups: Sequence[Setup], console: Console) -> None:
    """Print one column per number of GPUs."""
    # all setups differ in the number of GPUs only, so the first one has the common facts
    plans = [make_plan(stage, setup) for setup in setups]
    first, setup = plans[0], setups[0]
    counts, tera = first.parameters, first.flops_per_sample / 1e12
    for line in (
        f"{stage.name}: {counts['dit'] / 1e9:.2f}B parameters in the DiT, {counts['refiners'] / 1e9:.2f}B "
        "in the refiners",
        f"{tera:.2f} TFLOP per sample {_size(setup)}; MFU {setup.mfu:.0%} of {setup.peak_tflops:g} TFLOP/s",
        f"store {first.store_bytes / 1e12:.2f} TB: {setup.pairs:,} pairs of "
        f"{first.bytes_per_pair / 1e3:.0f} kB",
        f"checkpoint {first.checkpoint_bytes / 1e9:.1f} GB",
    ):
        console.print(line, highlight=False)
    if len(setup.latents) == 3:
        grid = stage.dit(setup.channels, axes=3).patch_grid(setup.latents)
        sizes, patches = (" x ".join(map(str, numbers)) for numbers in (setup.latents, grid))
        console.print(f"{math.prod(grid):,} patches, {patches}, of latents of {sizes}", highlight=False)
    for line in adapter_lines(stage, first.parameters, setups):
        console.print(line, highlight=False)
    if first.parts:
        show_parts(first.parts, console)
    table = Table("", *[f"{setup.gpus} GPUs" for setup in setups])
    table.add_row("samples per GPU and step", *[str(plan.local_batch) for plan in plans])
    table.add_row("of them at once", *[str(plan.micro_batch) for plan in plans])
    for kind in first.memory:
        table.add_row(f"{kind}, GB", *[f"{plan.memory[kind] / 1e9:.2f}" for plan in plans])
    table.add_row("memory per GPU, GB", *[f"{plan.total_memory / 1e9:.1f}" for plan in plans], style="bold")
    # both extremes, so that readers can choose `model.checkpoint_every`
    for label, every in (("no checkpointing", 0), ("every block", 1)):
        other, dit = (
            replace(stage, model=replace(stage.model, checkpoint_every=every)),
            stage.dit(setup.channels, axes=len(setup.latents)),
        )
        row = [
            activation_bytes(other, dit, setup) * plan.micro_batch / 1e9
            for setup, plan in zip(setups, plans, strict=True)
        ]
        table.add_row(f"activations, {label}, GB", *[f"{value:.1f}" for value in row])
    table.add_row("samples/s", *[f"{plan.samples_per_second:,.0f}" for plan in plans])
    table.add_row("days", *[f"{plan.days:.2f}" for plan in plans], style="bold")
    table.add_row("read per node, MB/s", *[f"{plan.read_per_node / 1e6:.0f}" for plan in plans])
    console.print(table)


def _size(setup: Setup) -> str:
    image = f"at {setup.height} x {setup.width}"
    if setup.frames is None:
        return image
    return f"of {setup.frames} frames {'' if encodes_clips(setup.downsampling) else 'of latents '}{image}"


def show_parts(parts: Sequence[PartCost], console: Console) -> None:
    """Print one row per part of an elastic network."""
    table = Table("part", "parameters, B", "TFLOP per sample", "of the full network", "passes per step")
    for part in parts:
        share = part.flops_per_sample / parts[0].flops_per_sample
        numbers = f"{part.parameters / 1e9:.2f}", f"{part.flops_per_sample / 1e12:.2f}"
        table.add_row(part.name, *numbers, f"{share:.0%}", f"{part.share:.2f}")
    console.print(table)


def adapter_lines(stage: StageConfig, parameters: dict[str, int], setups: Sequence[Setup]) -> Iterator[str]:
    """Yield what a stage with adapters trains, what its table of users takes, and how many users fit."""
    if "adapters" in parameters:
        yield f"frozen but for {parameters['adapters'] / 1e6:.1f}M parameters of adapters"
    if stage.users.count:
        size = 2 if stage.engine.precision == "bf16" else 4
        row = size * stage.users.tokens * stage.users.width
        yield (
            f"table of {stage.users.count:,} users: {row / 1e3:.0f} kB each, "
            f"{row * stage.users.count / 1e9:.2f} GB whole on each GPU while it is read, and as much again "
            "for its gradient"
        )
        for setup in setups:
            most = most_users(stage, setup, setup.gpu_memory)
            yield f"{setup.gpus} GPUs of {setup.gpu_memory / 1e9:g} GB hold at most {most:,} users"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", help="name of a shipped stage, or path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--gpus", type=_numbers, default=(8, 64, 512), help="one or more numbers of GPUs, such as 8,64,512"
    )
    parser.add_argument("--gpus-per-node", type=int, default=Setup.gpus_per_node)
    parser.add_argument("--gpu-memory", type=float, default=Setup.gpu_memory / 1e9, help="of a GPU, in GB")
    parser.add_argument("--mfu", type=float, default=Setup.mfu, help="share of the peak that is reached")
    parser.add_argument("--peak-tflops", type=float, default=Setup.peak_tflops)
    parser.add_argument(
        "--resolution", type=int, help="pixels of a square image; default: the stage's sample.height"
    )
    parser.add_argument(
        "--frames",
        type=int,
        help="frames of a clip, or of its latents if the downsampling has two numbers; default: images",
    )
    parser.add_argument(
        "--downsampling",
        type=_numbers,
        default=(Setup.downsampling,),
        help="pixels per position of the latents: one number, HEIGHT,WIDTH, or FRAMES,HEIGHT,WIDTH",
    )
    parser.add_argument(
        "--moments",
        choices=("mean_std", "mean"),
        default="mean_std",
        help="what is stored of the latents (latents.moments of the dataset)",
    )
    parser.add_argument(
        "--channels", type=int, default=Setup.channels, help="channels of the latents (default: %(default)s)"
    )
    parser.add_argument("--widths", type=_numbers, help="width of each LLM's states; default 4096 each")
    parser.add_argument("--caption-tokens", type=int, default=Setup.caption_tokens)
    parser.add_argument(
        "--max-caption-tokens",
        type=int,
        default=Setup.max_caption_tokens,
        help="tokens of the longest caption, for which memory has to suffice",
    )
    parser.add_argument("--prefix-tokens", type=int, default=Setup.prefix_tokens)
    parser.add_argument("--captions", type=int, default=Setup.captions, help="captions stored per pair")
    parser.add_argument("--pairs", type=int, default=Setup.pairs)
    return parser.parse_intermixed_args(arguments)


@command
def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m pipeline.estimate`."""
    options = parse(arguments)
    stage = load_stage(options.stage, options.overrides)
    setups = [
        Setup(
            gpus=gpus,
            gpus_per_node=options.gpus_per_node,
            gpu_memory=1e9 * options.gpu_memory,
            mfu=options.mfu,
            peak_tflops=options.peak_tflops,
            height=options.resolution or stage.sample.height,
            width=options.resolution or stage.sample.width,
            frames=options.frames,
            downsampling=options.downsampling if len(options.downsampling) > 1 else options.downsampling[0],
            channels=options.channels,
            means_alone=options.moments == "mean",
            llm_widths=options.widths or (4096,) * len(stage.fusion.families),
            prefix_tokens=options.prefix_tokens,
            caption_tokens=options.caption_tokens,
            max_caption_tokens=options.max_caption_tokens,
            captions=options.captions,
            pairs=options.pairs,
        )
        for gpus in options.gpus
    ]
    show(stage, setups, Console())


if __name__ == "__main__":
    main()
