"""Our training step against diffusers' PixArtTransformer2DModel under plain DeepSpeed ZeRO-3, in one run.

    python -m benchmarks.train_step [--processes 2] [--width 384 --depth 8 --heads 6]
    python -m benchmarks.train_step --trainer            # what the trainer runs: benchmarks/trainer_step.py

On a GPU, at 256 and 1,024 px:

    python -m benchmarks.train_step --preset li_dit_1b --side 32 --batch 64
    python -m benchmarks.train_step --preset li_dit_1b --side 128 --batch 8 --checkpoint-every 2

PixArt is the nearest published network: self-attention, cross-attention and a feed-forward layer, but one
modulation for all blocks where LI-DiT has one per block, 16 width^2 parameters per block instead of 25. So it
is in the table twice: with as many blocks, and with as many blocks as make its parameters equal. Batch,
latents, text tokens, precision and optimizer are the same; LI-DiT has no refiners, because PixArt has none.
Each network runs in processes of its own, in turns, so that a noisy machine slows all alike.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks import trainer_step
from benchmarks.processes import join_group
from benchmarks.reporting import GOAL_MFU, at_least, conditions, print_goals
from model.common.dtypes import DTYPES
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from model.flops import count_parameters, flops_per_sample
from model.presets import PRESETS
from pipeline.engine.engine import Engine
from pipeline.engine.processes import exit_process, join_process_group
from pipeline.runtime.distributed import free_port
from pipeline.stage.config import LogConfig, StageConfig
from pipeline.training.metrics import peak_flops

RESULTS = Path(__file__).parent / "results"
CHANNELS, LLM_WIDTH, LR = 16, 1024, 1e-4
FUSION = FusionConfig(families=["a"], mode="none", refiner="none")
OURS, SAME_DEPTH, SAME_PARAMETERS = (
    "LI-DiT, our engine",
    "PixArt, as many blocks",
    "PixArt, as many parameters",
)
Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def sizes(options: argparse.Namespace) -> DiTConfig:
    """Sizes of the DiT."""
    if options.preset:
        return PRESETS[options.preset]
    return DiTConfig(depth=options.depth, width=options.width, heads=options.heads, channels=CHANNELS)


def our_step(options: argparse.Namespace) -> tuple[Step, int]:
    """Build LI-DiT in our engine, and return a step of it and its number of parameters."""
    config = sizes(options)
    stage = StageConfig(
        name="benchmark", global_batch=options.processes * options.batch, samples=10**9, ema=[0.999]
    )
    stage.engine.precision, stage.engine.overlap_comm = options.precision, torch.cuda.is_available()
    stage.engine.reduce_bucket = stage.engine.prefetch_bucket = (
        100_000_000 if torch.cuda.is_available() else 10_000_000
    )
    stage.engine.max_live_parameters = stage.engine.max_reuse_distance = 2_000_000_000
    stage.model.compile = options.compile
    engine = Engine(
        lambda: LIDiT(config, FUSION, [LLM_WIDTH], options.checkpoint_every), stage, options.batch
    )

    def step(latents: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        prediction = engine(latents, Condition(timesteps, [Text(text, mask, 0, padded=False)]))
        engine.backward((prediction.float() - target).square().mean())
        engine.step(LR)
        engine.update_averages(stage.global_batch)

    return step, count_parameters(config, FUSION, [LLM_WIDTH])["total"]


def pixart(options: argparse.Namespace, depth: int) -> PixArtTransformer2DModel:
    """Build a PixArt with our width and heads."""
    config = sizes(options)
    return PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=depth,
        cross_attention_dim=config.width,
        sample_size=options.side,
        patch_size=config.patch,
        caption_channels=LLM_WIDTH,
        use_additional_conditions=False,
    )


def equal_depth(options: argparse.Namespace) -> int:
    """Number of PixArt's blocks that makes its parameters nearest to ours."""
    with torch.device("meta"):
        one, two = (
            sum(parameter.numel() for parameter in pixart(options, depth).parameters()) for depth in (1, 2)
        )
    ours = count_parameters(sizes(options), FUSION, [LLM_WIDTH])["total"]
    return round((ours - one) / (two - one)) + 1


def their_step(options: argparse.Namespace, depth: int) -> tuple[Step, int]:
    """Build PixArt under plain DeepSpeed ZeRO-3, and return a step of it and its number of parameters."""
    join_process_group(10)
    settings = {
        "train_micro_batch_size_per_gpu": options.batch,
        "bf16": {"enabled": options.precision == "bf16"},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100_000_000 if torch.cuda.is_available() else 10_000_000,
        },
    }

    with deepspeed.zero.Init(config_dict_or_path=settings):
        network = pixart(options, depth)
    if options.checkpoint_every:
        network.enable_gradient_checkpointing()

    parameters = sum(parameter.ds_numel for parameter in network.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, fused=True)
    engine, _, _, _ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    nothing = {"resolution": None, "aspect_ratio": None}

    def step(latents: Tensor, timesteps: Tensor, text: Tensor, target: Tensor) -> None:
        output = engine(
            latents, encoder_hidden_states=text, timestep=timesteps * 1000, added_cond_kwargs=nothing
        ).sample
        engine.backward((output.float() - target).square().mean())
        engine.step()

    return step, parameters


def measure(rank: int, options: argparse.Namespace, name: str, port: int, result: str) -> None:
    """Run one process of the benchmark; rank 0 writes seconds per step, parameters and peak memory."""
    join_group(rank, options.processes, port)
    torch.manual_seed(0)
    depth = {SAME_DEPTH: sizes(options).depth, SAME_PARAMETERS: options.equal_depth}
    step, parameters = our_step(options) if name == OURS else their_step(options, depth[name])
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )

    dtype = DTYPES[options.precision]
    shape = (options.batch, CHANNELS, options.side, options.side)
    batch = (
        torch.randn(shape, device=device, dtype=dtype),
        torch.rand(options.batch, device=device),
        torch.randn(options.batch, options.tokens, LLM_WIDTH, device=device, dtype=dtype),
        torch.randn(shape, device=device),
    )

    seconds = []
    for number in range(options.warmup + options.steps):
        begun = time.perf_counter()
        step(*batch)

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= options.warmup:
            seconds.append(time.perf_counter() - begun)

    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )

    if rank == 0:
        Path(result).write_text(json.dumps({"seconds": seconds, "parameters": parameters, "memory": memory}))

    exit_process(0)


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run all networks in turns, and return medians over all rounds."""
    rounds: dict[str, list[dict]] = {name: [] for name in (OURS, SAME_DEPTH, SAME_PARAMETERS)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, results in rounds.items():
                path = Path(folder) / "result.json"
                spawn(measure, args=(options, name, free_port(), str(path)), nprocs=options.processes)
                results.append(json.loads(path.read_text()))

    return {
        name: {
            "samples_per_second": options.processes
            * options.batch
            / statistics.median(seconds for r in results for seconds in r["seconds"]),
            "parameters": results[0]["parameters"],
            "memory": max(r["memory"] for r in results),
        }
        for name, results in rounds.items()
    }


def report(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    """Print the table and the line of JSON, and keep the table."""
    config = sizes(options)
    ours = results[OURS]["samples_per_second"]
    lines = [
        "# Training step against diffusers' PixArtTransformer2DModel under plain ZeRO-3",
        "",
        f"{conditions()}; {options.processes} processes, {options.precision}; width {config.width}, "
        f"{config.depth} blocks, {config.heads} heads, patch {config.patch}; "
        f"latents {CHANNELS} x {options.side} x {options.side}, {options.tokens} text tokens, "
        f"{options.batch} samples per process; compile {options.compile}, "
        f"checkpoint_every {options.checkpoint_every}; medians of {options.rounds} x {options.steps} steps.",
        "",
        "| | parameters | samples/s | ours is | peak memory per process |",
        "|---|---|---|---|---|",
    ]

    for name, result in results.items():
        speed = result["samples_per_second"]
        cells = [
            f"{result['parameters'] / 1e6:.1f}M",
            f"{speed:.2f}",
            f"{ours / speed:.2f}x",
            f"{result['memory'] / 2**30:.2f} GiB",
        ]

        lines.append(f"| {name} | {' | '.join(cells)} |")

    record = {name: ours / result["samples_per_second"] for name, result in results.items() if name != OURS}
    gpu = torch.cuda.is_available()
    goals = {"samples/s / PixArt's, equal parameters": at_least(record[SAME_PARAMETERS], 1.3 if gpu else 1.0)}
    flops = flops_per_sample(config, FUSION, [LLM_WIDTH], (options.side, options.side), [options.tokens])
    peak = peak_flops(LogConfig())

    if peak is not None:
        mfu = ours * flops / (peak * options.processes)
        formula = "6 x parameters x vectors + 12 x width x queries x keys, nothing recomputed counted"
        lines += [
            "",
            f"MFU {mfu:.1%}: {flops / 1e12:.3f} TFLOP per sample ({formula}), peak {peak / 1e12:g} TFLOP/s.",
        ]

        if options.preset == "li_dit_1b" and options.side in GOAL_MFU:
            goals["MFU"] = at_least(mfu, GOAL_MFU[options.side])

    lines += ["", *(f"{what}: {goal}." for what, goal in goals.items()), ""]
    unmeasured = "" if gpu else " Not measured on a GPU."
    lines.append(f"PixArt's memory has no EMA of the weights, ours has one.{unmeasured}")
    name = f"train_step_{options.preset}_{8 * options.side}px.md" if options.preset else "train_step.md"
    (RESULTS / name).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print_goals("train_step", goals, ratios=record)


def main() -> None:
    """Entry of `python -m benchmarks.train_step`."""
    if "--trainer" in sys.argv:
        trainer_step.main([argument for argument in sys.argv[1:] if argument != "--trainer"])
        return

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--side", type=int, default=32, help="side of the latents: pixels / 8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64 if cuda else 2, help="samples per process")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5 if cuda else 2)
    parser.add_argument("--steps", type=int, default=20 if cuda else 6)
    options = parser.parse_args()
    options.equal_depth = equal_depth(options)
    report(options, run(options))


if __name__ == "__main__":
    main()
