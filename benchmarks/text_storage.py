"""Bytes of a caption's hidden states in the store, and the error of quantizing them.

    python -m benchmarks.text_storage [--training runs/demo/store]

Bytes are counted for encoders 4,096 wide, from the token counts of real tokenizers. Errors are measured on
the hidden states of real LLMs, one channel at a time, in units of that channel's std, on captions that are
not in the calibration.

`--training` measures the cost of quantizing for the network: the demo's model on its pairs, `SEEDS` times
from int8 and from bf16 states, seed by seed on the same batches and noise.
"""

import argparse
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.captions import dense_captions, short_captions
from benchmarks.reporting import Goal, at_most, hardware, print_goals, versions
from benchmarks.text_encoding import ENCODERS
from data_prep.config import load_dataset
from data_prep.dataset.snapshot import take_snapshot
from data_prep.families.text import is_held_out, measure_channels, run_text
from data_prep.store.store import open_store
from model.common.errors import UserError, command
from model.common.share import Share
from model.encoders.quantize import dequantize, quantize
from model.encoders.text_encoder import load_encoder
from model.encoders.token_size import bytes_per_token
from pipeline.runtime.distributed import Distributed
from pipeline.runtime.run_log import read_events, read_reports
from pipeline.runtime.stopping import Stop
from pipeline.stage.config import load_stage
from pipeline.training.trainer import Trainer

TABLE = Path(__file__).parent / "results" / "text_storage.md"
WIDTH = 4096
QUANTISATIONS = ["bf16", "int8", "int6", "int4"]
DEMO = Path(__file__).parent.parent / "data_prep" / "datasets" / "demo.yaml"
SEEDS = 3
BATCH = 16
LAST_REPORTS = 10
"""Training loss is the mean of the last reports, 100 steps."""
SHORTER = [
    f"global_batch={BATCH}",
    "optim.warmup_samples=800",
    "data.workers=0",
    "data.validation_parts=1",
    "log.tensorboard=false",
    "log.every_steps=10",
]
"""The demo's stage and model with a smaller batch: six runs in minutes."""


def caption_bytes(quantisation: str, tokens: float) -> float:
    """Bytes of a caption's values and scales at `WIDTH` channels."""
    return tokens * (bytes_per_token(quantisation, WIDTH) + (0 if quantisation == "bf16" else 4))


def channel_errors(states: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Root mean square error of each channel [W], in units of its std."""
    exact = (states - mean) / std  # [N, W]
    errors = {}

    for quantisation in QUANTISATIONS:
        values, scales, _ = quantize(states, quantisation, mean, std)
        stored = dequantize(values, scales, quantisation, mean, std, torch.float32)
        errors[quantisation] = (stored - exact).square().mean(0).sqrt()

    scale = states.abs().amax(1, keepdim=True) / 127
    obvious = ((states / scale).round() * scale - mean) / std
    errors["int8, scale per token alone"] = (obvious - exact).square().mean(0).sqrt()

    return errors


def train(store: Path, families: list[str], seed: int, steps: int, runs: Path) -> tuple[float, float]:
    """Train once, and return its last training loss, and that of held-out pairs with the EMA weights."""
    torch.set_num_threads(1)
    name = f"{families[0]}-{seed}"
    samples = steps * BATCH
    settings = [
        f"name={name}",
        f"runs={runs}",
        f"data.store={store}",
        f"data.seed={seed}",
        f"fusion.families=[{','.join(families)}]",
        f"samples={samples}",
        f"checkpoint.every_samples={samples}",
        f"log.validate_every_samples={samples}",
    ]
    stage = load_stage("demo", SHORTER + settings)
    Trainer(stage, Distributed.from_environment(), Stop()).run()
    last = [report["loss"] for report in read_reports(stage.run)[-LAST_REPORTS:]]
    found = statistics.mean(last), read_events(stage.run, "validation")[-1]["loss"]
    print(f"{name}: training loss {found[0]:.5f}, held-out {found[1]:.5f}", flush=True)

    return found


def compare_training(store: Path, steps: int) -> tuple[list[str], dict[str, Goal]]:
    """Compare losses from int8 and from bf16 states, on a copy of the demo's store.

    Returns:
        Rows of the table, and goals.


    Raises:
        UserError: if the store is not that of a finished demo.
    """
    if not (store / "openmoji" / "commits").is_dir():
        raise UserError(
            f"{store}: not the store of a finished demo: run `make demo`, then give runs/demo/store"
        )

    with TemporaryDirectory(prefix="li-dit-") as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        copy, runs = Path(folder) / "store", Path(folder) / "runs"
        shutil.copytree(store, copy)
        config = load_dataset(DEMO, [f"store={copy}"])
        dataset = open_store(str(copy)).sub(config.name)
        names = {
            "int8": [text.name for text in config.text],
            "bf16": [f"{text.name}_bf16" for text in config.text],
        }

        for text, name in zip(config.text, names["bf16"], strict=True):
            run_text(config, replace(text, name=name, quantisation="bf16"), dataset, Share())

        take_snapshot(dataset)
        waiting = {
            quantisation: [pool.submit(train, copy, families, seed, steps, runs) for seed in range(SEEDS)]
            for quantisation, families in names.items()
        }
        losses = {quantisation: [run.result() for run in found] for quantisation, found in waiting.items()}

    rows, goals = [], {}
    for place, what in enumerate(("training", "held-out")):
        ours, theirs = ([pair[place] for pair in losses[quantisation]] for quantisation in ("int8", "bf16"))
        difference, noise = statistics.mean(ours) - statistics.mean(theirs), statistics.stdev(theirs)
        worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))

        for way, values in (("int8", ours), ("bf16", theirs)):
            mean, std = statistics.mean(values), statistics.stdev(values)
            shown = ", ".join(f"{value:.4f}" for value in values)
            figures = f"mean {mean:.4f} | std {std:.4f}"
            rows.append(f"{way} | {what} loss after {steps} steps, seeds: {shown} | {figures} |")

        figures = f"difference of means {difference:+.5f} | largest of one seed {worst:.5f}"
        rows.append(f"int8 against bf16 | {what} loss | {figures} |")
        goals[f"{what} loss, |int8 - bf16|, at most the std over seeds"] = at_most(abs(difference), noise)

    return rows, goals


@command
def main() -> None:
    """Measure, add the results to the table, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", type=int, default=500)
    parser.add_argument("--dense", type=int, default=24)
    parser.add_argument("--no-table", action="store_true", help="leave the table of results as it is")
    parser.add_argument(
        "--training", type=Path, metavar="STORE", help="compare training losses, on a finished demo's store"
    )
    parser.add_argument("--steps", type=int, default=500, help="of each run of --training")
    arguments = parser.parse_args()
    stamp = f"{date.today()} | {hardware()} | {versions()}"

    if arguments.training:
        found, goals = compare_training(arguments.training, arguments.steps)
        finish(
            [f"| {stamp} | demo's pairs and model, batches of {BATCH} | {row}" for row in found],
            goals,
            not arguments.no_table,
        )

        return

    kinds = {"short": short_captions(arguments.short), "dense": dense_captions(arguments.dense)}
    rows: list[str] = []
    goals: dict[str, Goal] = {}

    for config in ENCODERS:
        encoder = load_encoder(config, torch.device("cpu"))
        prefix = len(encoder.prefix_ids)
        ids = {kind: encoder.tokenize(captions) for kind, captions in kinds.items()}

        for kind, captions in ids.items():
            tokens = sum(map(len, captions)) / len(captions)
            ways = {
                "fp32, padded to 512": 512 * WIDTH * 4,
                "fp16, padded to 300": 300 * WIDTH * 2,
                "bf16, whole prompts, unpadded": caption_bytes("bf16", prefix + tokens),
                **{
                    f"ours, {quantisation}": caption_bytes(quantisation, tokens)
                    for quantisation in QUANTISATIONS
                },
            }

            base = ways["bf16, whole prompts, unpadded"]
            for way, size in ways.items():
                shares = f"{size / base:.3f} | {size / ways['ours, bf16']:.4f}"
                subject = f"{config.name}, {kind} ({tokens:.1f} tokens)"
                rows.append(f"| {stamp} | {subject} | {way} | {size:,.0f} B | {shares} |")

            goals[f"{config.name} {kind} int8 bytes / bf16 unpadded"] = at_most(
                ways["ours, int8"] / base, 0.5
            )
            alone = ways["ours, int8"] / ways["ours, bf16"]
            goals[f"{config.name} {kind} int8 bytes / bf16 captions alone"] = at_most(alone, 0.5)

        texts = kinds["short"] + kinds["dense"]
        states = encoder.encode(ids["short"] + ids["dense"])
        mean, std = measure_channels(
            [state for state, text in zip(states, texts, strict=True) if not is_held_out(text)]
        )
        held_out = torch.cat(
            [state for state, text in zip(states, texts, strict=True) if is_held_out(text)]
        ).float()

        for way, error in channel_errors(held_out, mean, std).items():
            rows.append(
                f"| {stamp} | {config.name}, {len(held_out)} held-out tokens | {way} | error a channel "
                f"| mean {error.mean():.2%} | worst {error.max():.2%} |"
            )
            if way == "int8":
                goals[f"{config.name} int8 worst channel"] = at_most(error.max().item(), 0.01)

    finish(rows, goals, not arguments.no_table)


def finish(rows: list[str], goals: dict[str, Goal], writes: bool) -> None:
    """Print the rows, add them to the table if wanted, and print one line of JSON."""
    print("\n".join(rows))
    if writes:
        with TABLE.open("a") as table:
            table.write("".join(row + "\n" for row in rows))
    print_goals("text_storage", goals)


if __name__ == "__main__":
    main()
