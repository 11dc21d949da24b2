"""Parts of an elastic network against the full one, sparse against dense attention, and the wavelet encoder
against the small VAE's, in one run.

    python -m benchmarks.elastic            # two minutes on two cores
    python -m benchmarks.elastic --tiny     # seconds: no figures, only that it runs
    python -m benchmarks.elastic --trained runs/demo/vae runs/demo/wavelet    # with the quality of two VAEs

The parts take turns, so that a noisy machine slows all alike; times are medians over the rounds. The share of
the full network's time is beside the share of its FLOPs. Attention is that of one layer, without gradients,
on grids of up to 16,384 patches. The encoders' weights are random, on which their time does not depend; how
close their images come is read from the folders of a trained teacher and its student (`pipeline.train_vae`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reporting import at_least, at_most, conditions, print_goals
from model.attention_config import AttentionConfig
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.elastic.config import ElasticConfig
from model.elastic.network import ElasticLIDiT
from model.encoders.vae import VAE, small_vae
from model.encoders.wavelet import WaveletAutoencoder, WaveletSpace
from model.flops import flops_per_sample
from model.sparse_attention import SparseSelfAttention
from model.sub_network import SubNetwork
from pipeline.train_vae import SETTINGS, STUDENT

RESULTS = Path(__file__).parent / "results"
CHANNELS, LLM_WIDTH, TOKENS = 16, 256, 64
DEVIATION = 0.10
"""Most that a part's share of the time may exceed its share of the FLOPs, as a part of the latter."""
SPEEDUP = 2.0
"""Dense / sparse seconds at the largest grid."""
ENCODER_SPEEDUP = 4.0
"""Seconds of the teacher's encoder / of the wavelet encoder."""
LOST_DB = 1.5
"""Most that the wavelet autoencoder's PSNR may be below the teacher's."""


def measure(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way, which take turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            begun = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(own) for name, own in seconds.items()}


def time_parts(options: argparse.Namespace) -> list[tuple[SubNetwork, float, float, float]]:
    """Return of each part its share of the full network's FLOPs, seconds per training step and per sampling
    step."""
    sizes = DiTConfig(depth=options.depth, width=options.width, heads=4, patch=2, channels=CHANNELS)
    elastic = ElasticConfig(depths=[options.depth, options.depth // 2], patches=[2, 4])
    fusion = FusionConfig(families=["a"], mode="none", refiner="none")
    torch.manual_seed(0)
    network = ElasticLIDiT(sizes, fusion, [LLM_WIDTH], elastic)

    latents = torch.randn(options.batch, CHANNELS, options.side, options.side)
    states = torch.randn(options.batch, TOKENS, LLM_WIDTH)
    text = Text(states, torch.ones(states.shape[:2], dtype=torch.bool), 0, padded=False)
    condition = Condition(torch.rand(options.batch), [text])

    def train(part: SubNetwork) -> None:
        network(latents, replace(condition, part=part)).square().mean().backward()
        network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample(part: SubNetwork) -> None:
        network(latents, replace(condition, part=part))

    parts = elastic.parts(sizes)
    training = measure({str(part): lambda part=part: train(part) for part in parts}, options.rounds)
    sampling = measure({str(part): lambda part=part: sample(part) for part in parts}, options.rounds)

    flops = []
    for part in parts:
        own = replace(sizes, depth=part.depth, patch=part.patch)
        flops.append(flops_per_sample(own, fusion, [LLM_WIDTH], latents.shape[2:], [TOKENS]))
    rows = zip(parts, flops, strict=True)
    return [(part, own / flops[0], training[str(part)], sampling[str(part)]) for part, own in rows]


@torch.no_grad()
def time_attention(options: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Return the seconds of dense and of sparse attention, by the number of patches."""
    config = AttentionConfig("block_sparse", keep=options.keep)
    layer = SparseSelfAttention(options.width, 4, config)
    results = {}
    for side in options.grids:
        x = torch.randn(1, side * side, options.width)
        ways = {
            "dense": lambda x=x: layer(x),
            "sparse": lambda x=x, side=side: layer.forward_tiles(x, side, side, True),
        }
        seconds = measure(ways, options.rounds)
        results[side * side] = seconds["dense"], seconds["sparse"]
    return results


@torch.no_grad()
def time_encoders(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of encoding an image with the small VAE and with the wavelet autoencoder."""
    teacher = VAE(small_vae().eval(), "")
    student = WaveletSpace(WaveletAutoencoder(STUDENT).eval(), "")
    pixels = torch.randn(1, 3, options.pixels, options.pixels)
    ways = {"small VAE": lambda: teacher.encode(pixels), "wavelet": lambda: student.encode(pixels)}
    # A tenth of a second a round: more rounds, since the first ones find the machine in another state.
    return measure(ways, 6 * options.rounds)


def read_quality(folders: Sequence[Path]) -> list[float]:
    """Return the PSNR in dB of a trained teacher and of its student, on the same images."""
    return [json.loads((folder / SETTINGS).read_text())["psnr"] for folder in folders]


def report(
    options: argparse.Namespace,
    parts: Sequence[tuple[SubNetwork, float, float, float]],
    attention: Mapping[int, tuple[float, float]],
    encoders: Mapping[str, float],
    quality: Sequence[float] = (),
) -> list[str]:
    """Print the tables and the line of JSON; return the tables."""
    lines = [
        "# Parts of an elastic network, and sparse attention",
        "",
        f"{conditions()}; fp32; width {options.width}, {options.depth} blocks, latents {CHANNELS} x "
        f"{options.side} x {options.side}, {options.batch} samples; medians of {options.rounds} rounds.",
        "",
        "| part | share of FLOPs | training step, s | share | sampling step, s | share |",
        "|---|---|---|---|---|---|",
    ]
    _, _, full_training, full_sampling = parts[0]
    excess = {}
    for part, flops, training, sampling in parts:
        shares = training / full_training, sampling / full_sampling
        lines.append(
            f"| {part} | {flops:.3f} | {training:.4f} | {shares[0]:.3f} | {sampling:.4f} | {shares[1]:.3f} |"
        )
        excess[str(part)] = max(shares) / flops - 1

    lines += ["", "| patches | dense, s | sparse, s | dense / sparse |", "|---|---|---|---|"]
    for patches, (dense, sparse) in attention.items():
        lines.append(f"| {patches:,} | {dense:.4f} | {sparse:.4f} | {dense / sparse:.2f}x |")

    faster = encoders["small VAE"] / encoders["wavelet"]
    seconds = ", ".join(f"{name} {value:.4f} s" for name, value in encoders.items())
    lines += ["", f"Encoding one image of {options.pixels} x {options.pixels} pixels: {seconds}."]

    dense, sparse = attention[max(attention)]
    goals = {
        "a part's share of the time / of the FLOPs": at_most(1 + max(excess.values()), 1 + DEVIATION),
        f"dense / sparse at {max(attention):,} patches": at_least(dense / sparse, SPEEDUP),
        "encoding, small VAE / wavelet": at_least(faster, ENCODER_SPEEDUP),
    }
    if quality:
        teacher, student = quality
        lines += ["", f"PSNR: small VAE {teacher:.2f} dB, wavelet {student:.2f} dB."]
        goals["dB below the small VAE"] = at_most(teacher - student, LOST_DB)
    lines += ["", *(f"{what}: {goal}." for what, goal in goals.items())]
    print("\n".join(lines))
    print_goals(
        "elastic", goals, excess=excess, attention={str(key): value for key, value in attention.items()}
    )
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="side of the latents: pixels / 8")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.16)
    parser.add_argument("--grids", type=int, nargs="+", default=[32, 64, 128], help="sides in patches")
    parser.add_argument("--pixels", type=int, default=256, help="side of the image that is encoded")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--trained", type=Path, nargs=2, metavar=("TEACHER", "WAVELET"), help="folders of pipeline.train_vae"
    )
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, which measure nothing")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.width, options.depth, options.side, options.batch = 32, 4, 8, 1
        options.grids, options.rounds, options.pixels = [16, 32], 1, 32
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m benchmarks.elastic`."""
    options = parse(arguments)
    quality = read_quality(options.trained or ())
    lines = report(options, time_parts(options), time_attention(options), time_encoders(options), quality)
    if not options.tiny:
        (RESULTS / "elastic.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
