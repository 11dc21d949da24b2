"""Parts of an elastic network against the full one, sparse against dense attention, and the wavelet encoder
against the small VAE's, in one run.

    python -m benchmarks.elastic            # ten minutes on two cores
    python -m benchmarks.elastic --tiny     # seconds: no figures, only that it runs
    python -m benchmarks.elastic --trained runs/demo/vae runs/demo/wavelet    # with the quality of two VAEs

The share of the full network's time is beside the share of its FLOPs, forward and backward (without an
optimizer) and in sampling. A noisy machine slows neighbors in time alike. So in each round a part runs
between two runs of the full network, as often as it takes about as long, and its share is the median of the
rounds' ratios. Attention is that of one layer, without gradients, on grids of up to 16,384 patches; its times
and the encoders' are medians over rounds in which they take turns. The encoders are those of the folders of a
trained teacher and its student (`pipeline.train_vae`), whose quality is read there; without folders the
weights are random, on which the time does not depend.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.reporting import at_least, at_most, conditions, print_goals
from model.attention_config import AttentionConfig
from model.condition import Condition, Text
from model.config import DiTConfig, FusionConfig
from model.elastic.config import ElasticConfig
from model.elastic.network import ElasticLIDiT
from model.encoders.latent_spaces import LatentSpace, load_latent_space
from model.encoders.vae import VAE, small_vae
from model.encoders.wavelet import WaveletAutoencoder, WaveletSpace
from model.flops import flops_per_sample
from model.sparse_attention import SparseSelfAttention
from model.sub_network import SubNetwork
from pipeline.train_vae import SETTINGS
from pipeline.vae.distillation import STUDENT

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


class Timed(NamedTuple):
    """Time of a part, of one kind of pass."""

    seconds: float
    """Median over the rounds."""
    share: float
    """Share of the full network's time: median over the rounds."""


def measure_shares(
    run: Callable[[SubNetwork], object], shares: Mapping[SubNetwork, float], rounds: int
) -> dict[SubNetwork, Timed]:
    """Return the times of the parts, each measured between two runs of the full network; the first round is
    not counted.

    Args:
        run: runs a part once.
        shares: share of the FLOPs of each part, the full network first.
        rounds: that are counted.
    """

    def seconds_of(part: SubNetwork) -> float:
        repeats = max(1, round(1 / shares[part]))
        begun = time.perf_counter()
        for _ in range(repeats):
            run(part)
        return (time.perf_counter() - begun) / repeats

    full, *others = shares
    seconds: dict[SubNetwork, list[float]] = {part: [] for part in shares}
    ratios: dict[SubNetwork, list[float]] = {part: [] for part in others}
    for number in range(rounds + 1):
        before = seconds_of(full)
        for part in others:
            own, after = seconds_of(part), seconds_of(full)
            if number:
                seconds[part].append(own)
                seconds[full] += [before, after]
                ratios[part].append(2 * own / (before + after))
            before = after

    medians = {part: statistics.median(own) for part, own in seconds.items()}
    times = {full: Timed(medians[full], 1.0)}
    for part, own in ratios.items():
        times[part] = Timed(medians[part], statistics.median(own))
    return times


class PartTimes(NamedTuple):
    """Cost of a part."""

    flops: float
    """Its share of the full network's."""
    training: Timed
    """Forward and backward."""
    sampling: Timed


def time_parts(options: argparse.Namespace) -> dict[SubNetwork, PartTimes]:
    """Return the costs of all parts, the full network first."""
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

    flops = {}
    for part in elastic.parts(sizes):
        own = replace(sizes, depth=part.depth, patch=part.patch)
        flops[part] = flops_per_sample(own, fusion, [LLM_WIDTH], latents.shape[2:], [TOKENS])
    most = max(flops.values())
    shares = {part: own / most for part, own in flops.items()}

    training = measure_shares(train, shares, options.rounds)
    sampling = measure_shares(sample, shares, options.rounds)
    return {part: PartTimes(share, training[part], sampling[part]) for part, share in shares.items()}


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


def find_encoders(folders: Sequence[Path] | None) -> tuple[LatentSpace, LatentSpace]:
    """Return a trained teacher and its student; without folders, new ones of the sizes that are trained."""
    if folders:
        teacher, student = (load_latent_space(str(folder), None, torch.device("cpu")) for folder in folders)
        return teacher, student
    return VAE(small_vae().eval(), ""), WaveletSpace(WaveletAutoencoder(STUDENT).eval(), "")


@torch.no_grad()
def time_encoders(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of encoding an image with the small VAE and with the wavelet autoencoder."""
    teacher, student = find_encoders(options.trained)
    pixels = torch.randn(1, 3, options.pixels, options.pixels)
    ways = {"small VAE": lambda: teacher.encode(pixels), "wavelet": lambda: student.encode(pixels)}
    # A tenth of a second a round: more rounds, since the first ones find the machine in another state.
    return measure(ways, 6 * options.rounds)


def read_quality(folders: Sequence[Path] | None) -> dict[str, float]:
    """Return the PSNR in dB of a trained teacher, of its student and of the student's halves with the
    teacher's other ones, on the same images; empty without folders."""
    if not folders:
        return {}
    teacher, student = (json.loads((folder / SETTINGS).read_text()) for folder in folders)

    quality = {"small VAE": teacher["psnr"], "wavelet": student["psnr"]}
    for half in ("encoder", "decoder"):
        # Students of earlier versions have no record of it.
        if f"psnr_own_{half}" in student:
            quality[f"wavelet {half} alone"] = student[f"psnr_own_{half}"]
    return quality


def report(
    options: argparse.Namespace,
    parts: Mapping[SubNetwork, PartTimes],
    attention: Mapping[int, tuple[float, float]],
    encoders: Mapping[str, float],
    quality: Mapping[str, float],
) -> list[str]:
    """Print the tables and the line of JSON; return the tables."""
    lines = [
        "# Parts of an elastic network, and sparse attention",
        "",
        f"{conditions()}; fp32; width {options.width}, {options.depth} blocks, latents {CHANNELS} x "
        f"{options.side} x {options.side}, {options.batch} samples; medians of {options.rounds} rounds.",
        "",
        "| part | share of FLOPs | forward and backward, s | share | sampling step, s | share |",
        "|---|---|---|---|---|---|",
    ]
    excess = {}
    for part, (flops, training, sampling) in parts.items():
        row = [f"{flops:.3f}"]
        for timed in (training, sampling):
            row += [f"{timed.seconds:.4f}", f"{timed.share:.3f}"]
        lines.append(f"| {part} | {' | '.join(row)} |")
        excess[str(part)] = max(training.share, sampling.share) / flops - 1

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
        lines += ["", f"PSNR: {', '.join(f'{name} {value:.2f} dB' for name, value in quality.items())}."]
        lost = quality["small VAE"] - quality["wavelet"]
        goals["dB below the small VAE"] = at_most(lost, LOST_DB)
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
    parser.add_argument("--rounds", type=int, default=15)
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
    quality = read_quality(options.trained)
    lines = report(options, time_parts(options), time_attention(options), time_encoders(options), quality)
    if not options.tiny:
        (RESULTS / "elastic.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
