"""Write the YAML of a stage that fits a prepared dataset and a number of GPUs.

    python -m pipeline.init DATASET.yaml --gpus 8
    python -m pipeline.init DATASET.yaml --gpus 64 --gpu-memory 141 --preset li_dit_10b --out big.yaml

The dataset needs at least a plan. Sizes, memory and days are those of `pipeline.estimate`; optimizer and
engine are those of the stage that is shipped for the preset. Each value that is chosen has a comment with the
numbers that it follows from. `--gpus 0` is for training on the CPU.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.config import DatasetConfig, load_dataset
from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.dataset.snapshot_reader import last_taken, read_families, read_snapshot
from data_prep.plan.budget import CHARACTERS_PER_TOKEN, model_size
from data_prep.store.store import open_store
from model.common.errors import UserError, command
from model.common.settings import load_yaml
from model.common.yaml_writing import Line, as_value, as_yaml, refuse_existing, write_new
from pipeline.operations.planning import Plan, Setup, make_plan
from pipeline.stage.config import STAGES, StageConfig, load_stage

TEMPLATES = {"tiny": "demo", "li_dit_1b": "li_dit_1b_256", "li_dit_10b": "li_dit_10b_512"}
"""Preset -> the shipped stage whose optimizer, engine and batch are taken."""
MIN_PAIRS = {"tiny": 0, "li_dit_1b": 1_000_000, "li_dit_10b": 100_000_000}
"""Pairs from which a preset is worth its size; the paper trains 1B on 30 million and 10B on a billion."""
EPOCHS = 34
"""Passes over the pairs: those of the paper's 1B, 500,000 batches of 2,048 from 30 million pairs."""
MAX_DAYS = 90.0
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that is planned; the rest is for its context, and lost between blocks."""
ENOUGH_AT_ONCE = 8
"""Samples at once from which a GPU is busy; with fewer, activations are rather recomputed."""
BATCHES_PER_EPOCH = 4
"""Batches that the largest bucket has to fill."""
SHIFTS = {512: 2.0, 1024: 3.0}
"""Resolution -> shift of the time toward noise."""
CHECKPOINTS = 10
PEAK = f"{Setup.mfu:.0%} of {Setup.peak_tflops:g} TFLOP/s per GPU"
VALIDATED_PARTS = 20
"""Parts of the largest bucket from which one is held out."""


@dataclass(frozen=True)
class Facts:
    """Facts about a dataset in its store."""

    source: str
    """The snapshot or the plan that they come from."""
    buckets: dict[str, int]
    """Bucket -> its pairs."""
    parts: dict[str, int]
    """Bucket -> its parts."""
    widths: tuple[int, ...]
    """Width of each LLM's states."""
    channels: int
    downsampling: int
    prefix_tokens: int
    caption_tokens: int
    captions: int
    """Captions per pair."""

    @property
    def pairs(self) -> int:
        """All pairs."""
        return sum(self.buckets.values())

    @property
    def largest(self) -> str:
        """The bucket with the most pairs."""
        return max(sorted(self.buckets), key=lambda bucket: self.buckets[bucket])


def read_facts(config: DatasetConfig) -> Facts:
    """Read a dataset's facts from its store, as far as it is prepared.

    Raises:
        UserError: if it has no plan yet.
    """
    dataset = open_store(config.store).sub(config.name)
    plan, record = read_plan(dataset), read_plan_record(dataset)
    source = "the plan"
    parts = {name: len(rows) for name, rows in plan.buckets.items()}
    buckets = {name: sum(rows) for name, rows in plan.buckets.items()}
    # A snapshot may be partial, and training reads nothing else.
    if last_taken(dataset) is not None:
        snapshot = read_snapshot(dataset)
        source = f"snapshot {snapshot.id}"
        parts = {name: entry["parts"] for name, entry in snapshot.buckets.items()}
        buckets = {name: entry["rows"] for name, entry in snapshot.buckets.items()}

    families = read_families(dataset)
    widths = []
    for text in config.text:
        size = None if text.name in families else model_size(text)
        width = size.width if size else max(Setup.llm_widths)
        widths.append(int(families[text.name].info["width"]) if text.name in families else width)

    latents = families[config.latents[0].name].info if config.latents[0].name in families else {}
    captions = sum(record["captions"]["kept"].values())
    letters = sum(record["captions"]["letters"].values())
    prefixes = [
        int(families[text.name].info["prefix_tokens"]) for text in config.text if text.name in families
    ]

    return Facts(
        source=source,
        buckets=buckets,
        parts=parts,
        widths=tuple(widths),
        channels=int(latents.get("channels", Setup.channels)),
        downsampling=int(latents.get("downsampling", Setup.downsampling)),
        prefix_tokens=max(prefixes, default=Setup.prefix_tokens),
        caption_tokens=max(1, round(letters / max(1, captions) / CHARACTERS_PER_TOKEN)),
        captions=max(1, round(captions / max(1, sum(map(sum, plan.buckets.values()))))),
    )


@dataclass(frozen=True)
class Choice:
    """A stage that fits, and what follows from it."""

    preset: str
    stage: StageConfig
    plan: Plan
    world: int
    """Processes."""


class Chooser:
    """Finds the settings of a stage for a dataset on a number of GPUs."""

    def __init__(self, config: DatasetConfig, facts: Facts, gpus: int, memory: float) -> None:
        """Keep what the choice depends on.

        Args:
            config: the dataset's settings.
            facts: what its store says.
            gpus: number of GPUs; 0 = the CPU.
            memory: of a GPU, in GB.
        """
        self._config, self._facts = config, facts
        self._gpus, self._memory = gpus, memory
        self.world = max(1, gpus)
        if facts.buckets[facts.largest] < self.world:
            raise UserError(
                f"--gpus {gpus}: the largest bucket has {facts.buckets[facts.largest]:,} pairs, fewer than "
                "one per GPU: take fewer GPUs"
            )

    def choose(self, preset: str) -> tuple[Choice, list[str]]:
        """Return the stage of a preset, or of the largest that fits if none is given, with the reasons.

        Raises:
            UserError: if the memory of the GPUs is too small.
        """
        if preset:
            choice = self._fitted(preset)
            if choice is None:
                raise UserError(
                    f"--preset {preset} does not fit into {self._memory:g} GB on {self._gpus} GPUs: give "
                    "more GPUs or another preset; see `python -m pipeline.estimate`"
                )
            return choice, [f"{preset}: as asked for"]

        reasons: list[str] = []
        for name in reversed(TEMPLATES):
            wanted = MIN_PAIRS[name]
            if self._gpus == 0 and name != "tiny":
                reasons.append(f"{name}: not on a CPU")
            elif self._facts.pairs < wanted:
                reasons.append(f"{name}: worth it from {wanted:,} pairs")
            elif (choice := self._fitted(name)) is None:
                reasons.append(f"{name}: more than {self._memory:g} GB per GPU")
            elif choice.plan.days > MAX_DAYS and name != "tiny":
                reasons.append(f"{name}: {choice.plan.days:,.0f} days on {self._gpus} GPUs")
            else:
                return choice, [*reasons, f"{name}: the largest that is left"]
        raise UserError(
            f"no preset fits into {self._memory:g} GB per GPU: give --gpu-memory, or --gpus 0 for the CPU"
        )

    def _fitted(self, preset: str) -> Choice | None:
        """Return the preset's stage with the most samples at once that fit; None if not one does."""
        local = self._batch(preset) // self.world
        if self._gpus == 0:
            return self._choice(preset, local, 0)

        # Recomputed activations cost a third of the speed, so only where the memory needs it.
        for every in (0, 1):
            alone = self._choice(preset, 1, every).plan
            per_sample = alone.memory["activations"]
            room = MEMORY_SHARE * self._memory * 1e9 - (alone.total_memory - per_sample)
            fitting = [
                size for size in range(1, local + 1) if local % size == 0 and size * per_sample <= room
            ]
            if fitting and (every or fitting[-1] >= min(ENOUGH_AT_ONCE, local)):
                return self._choice(preset, fitting[-1], every)

        return None

    def _batch(self, preset: str) -> int:
        """Return the global batch: the template's, if the largest bucket fills some of them."""
        rows = self._facts.buckets[self._facts.largest]
        wanted = min(_template(preset).global_batch, rows // BATCHES_PER_EPOCH)
        return max(1, wanted // self.world) * self.world

    def _choice(self, preset: str, micro: int, every: int) -> Choice:
        """Return a preset's stage.

        Args:
            preset: the preset.
            micro: samples at once.
            every: 1 = recompute the activations of each block; 0 = keep them.
        """
        facts, resolution = self._facts, self._config.buckets.resolution
        template, batch = _template(preset), self._batch(preset)
        # A small set needs as many steps as the demo's.
        samples = max(EPOCHS * facts.pairs, _template("tiny").samples)
        if preset != "tiny":
            samples = min(samples, template.samples)

        nodes = math.ceil(self.world / Setup.gpus_per_node)
        families = [text.name for text in self._config.text]
        mode = "none" if len(families) == 1 else "collaborative"
        # 8 x 8 latents are too few to be joined to patches.
        patch = 1 if resolution // facts.downsampling <= 8 else 2
        stage = replace(
            template,
            samples=math.ceil(samples / batch) * batch,
            global_batch=batch,
            data=replace(template.data, canonical_nodes=nodes if batch % nodes == 0 else 1),
            fusion=replace(template.fusion, families=families, mode=mode),
            model=replace(template.model, patch=patch, checkpoint_every=every),
            engine=replace(template.engine, micro_batch=micro),
        )
        setup = Setup(
            gpus=self.world,
            height=resolution,
            width=resolution,
            llm_widths=facts.widths,
            prefix_tokens=facts.prefix_tokens,
            caption_tokens=facts.caption_tokens,
            captions=facts.captions,
            pairs=facts.pairs,
            channels=facts.channels,
            downsampling=facts.downsampling,
        )

        return Choice(preset, stage, make_plan(stage, setup), self.world)


@cache
def _template(preset: str) -> StageConfig:
    """Return the shipped stage of a preset."""
    return load_stage(TEMPLATES[preset])


def stage_lines(
    config: DatasetConfig, facts: Facts, choice: Choice, reasons: list[str], gpus: int
) -> Iterator[Line]:
    """Yield the stage's YAML.

    Args:
        config: the dataset's settings.
        facts: what its store says.
        choice: the settings that fit.
        reasons: the reasons for the preset.
        gpus: number of GPUs; 0 = the CPU.
    """
    stage, plan = choice.stage, choice.plan
    template = TEMPLATES[choice.preset]
    given: dict[str, Any] = OmegaConf.to_container(load_yaml(STAGES / f"{template}.yaml"))  # type: ignore[assignment]
    batch, samples = stage.global_batch, stage.samples
    machine = f"{gpus} GPUs" if gpus else "the CPU"
    yield "", f"Written by `python -m pipeline.init` for {machine}; change what does not fit."
    yield "", f"Unexplained values are those of pipeline/stages/{template}.yaml."
    yield f"name: {as_value(config.name)}", "The run's folder is runs/<name>."
    epochs = samples / facts.pairs
    yield (
        f"samples: {samples}",
        f"{epochs:,.1f} times the {facts.pairs:,} pairs of {facts.source}; "
        + (f"about {_duration(plan.days)} at {PEAK}." if gpus else "at least as many as the demo's."),
    )
    small = {name: rows for name, rows in facts.buckets.items() if rows < batch}
    yield (
        f"global_batch: {batch}",
        f"A multiple of {choice.world}, and at most a quarter of the largest bucket's "
        f"{facts.buckets[facts.largest]:,} pairs; {sum(small.values()):,} pairs in smaller buckets than a "
        "batch are left out.",
    )
    yield from _data_lines(config, facts, stage)

    fusion = {"families": stage.fusion.families, "mode": stage.fusion.mode}
    kept = {key: entry for key, entry in given.get("fusion", {}).items() if key not in fusion}
    yield from _section(
        "fusion", {**fusion, **kept}, f"Widths of the states: {', '.join(map(str, facts.widths))}."
    )

    counts = plan.parameters
    model = {**given.get("model", {}), "preset": choice.preset, "patch": stage.model.patch}
    model["checkpoint_every"] = stage.model.checkpoint_every
    yield from _section(
        "model",
        model,
        f"{'; '.join(reasons)}. {counts['dit'] / 1e6:,.1f}M parameters in the DiT, "
        f"{counts['refiners'] / 1e6:,.1f}M in the refiners.",
    )
    yield from _objective_lines(given.get("objective", {}), config.buckets.resolution)
    optim = dict(given.get("optim", {}))
    optim["warmup_samples"] = min(optim.get("warmup_samples", samples // 20), samples // 20)
    yield from _section("optim", optim, "The warm-up is at most a twentieth of the samples.")
    yield from _engine_lines(given.get("engine", {}), choice, gpus)
    if "ema" in given:
        yield f"ema: {as_value(given['ema'])}", ""

    every = math.ceil(samples / CHECKPOINTS / batch) * batch
    if choice.preset != "tiny":
        every = min(every, max(1, stage.checkpoint.every_samples // batch) * batch)
    yield from _section(
        "checkpoint", {"every_samples": every}, f"Each has {plan.checkpoint_bytes / 1e9:.2g} GB."
    )
    sides = {"height": config.buckets.resolution, "width": config.buckets.resolution}
    yield from _section("sample", {**given.get("sample", {}), **sides}, "The dataset's resolution.")
    log = dict(given.get("log", {}))
    log.pop("validate_every_samples", None)
    if _validated(facts):
        log["validate_every_samples"] = every
    if log:
        yield from _section("log", log, "")


def _data_lines(config: DatasetConfig, facts: Facts, stage: StageConfig) -> Iterator[Line]:
    names = [latents.name for latents in config.latents]
    others = f" The dataset also has {', '.join(names[1:])}." if len(names) > 1 else ""
    data: dict[str, Any] = {"store": config.store, "dataset": config.name, "latents": names[0]}
    data |= {"workers": stage.data.workers, "canonical_nodes": stage.data.canonical_nodes}
    if len(config.caption_kinds) > 1:
        data["caption_weights"] = dict.fromkeys(config.caption_kinds, 1.0)
    if _validated(facts):
        data["validation_parts"] = 1
    yield from _section("data", data, f"{len(facts.buckets):,} buckets, largest {facts.largest}.{others}")


def _validated(facts: Facts) -> bool:
    """True if there is enough data to hold some of it out."""
    return facts.parts[facts.largest] >= VALIDATED_PARTS


def _objective_lines(given: Mapping[str, Any], resolution: int) -> Iterator[Line]:
    objective = {key: entry for key, entry in given.items() if key != "shift"}
    if resolution in SHIFTS:
        objective["shift"] = SHIFTS[resolution]
        yield from _section("objective", objective, f"More noise at {resolution} px than at 256.")
    elif objective:
        yield from _section("objective", objective, "")


def _duration(days: float) -> str:
    """Return days in words."""
    return f"{days:.3g} days" if days >= 1 else f"{24 * days:.2g} hours"


def _engine_lines(given: Mapping[str, Any], choice: Choice, gpus: int) -> Iterator[Line]:
    plan = choice.plan
    engine = {**given, "micro_batch": plan.micro_batch}
    total = f"{plan.total_memory / 1e9:.3g} GB per GPU, {plan.memory['activations'] / 1e9:.3g} of them"
    why = f"{total} activations of {plan.micro_batch} samples at once of {plan.local_batch} per GPU and step."
    yield from _section("engine", engine, why if gpus else "All samples of a step at once.")


def _section(name: str, settings: Mapping[str, Any], why: str) -> Iterator[Line]:
    """Yield a block of settings with a comment above it."""
    yield f"{name}:", why
    for key, content in settings.items():
        yield f"  {key}: {as_value(content)}", ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.init",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", type=Path, metavar="DATASET.yaml", help="the dataset's settings")
    add("overrides", nargs="*", metavar="key=value", help="settings of the dataset to change")
    add("--gpus", type=int, required=True, help="number of GPUs; 0 = train on the CPU")
    add("--gpu-memory", type=float, default=80.0, help="of each GPU, in GB (default 80)")
    add(
        "--preset", choices=TEMPLATES, default="", help="size of the network (default: the largest that fits)"
    )
    add("--out", type=Path, help="the YAML to write, which must not exist (default <name>_stage.yaml)")

    return parser.parse_intermixed_args(arguments)


@command
def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m pipeline.init`."""
    options = parse(arguments)
    if options.gpus < 0 or not options.gpu_memory > 0:
        raise UserError(f"--gpus {options.gpus} --gpu-memory {options.gpu_memory:g}: give numbers above 0")

    config = load_dataset(options.dataset, options.overrides)
    out: Path = options.out or Path(f"{config.name}_stage.yaml")
    refuse_existing(out)
    for name in ("latents", "text"):
        if not getattr(config, name):
            raise UserError(
                f"{options.dataset}: `{name}` names no family, and training reads one: add it, see "
                "data_prep/datasets/demo.yaml"
            )

    facts = read_facts(config)
    choice, reasons = Chooser(config, facts, options.gpus, options.gpu_memory).choose(options.preset)
    write_new(out, as_yaml(list(stage_lines(config, facts, choice, reasons, options.gpus))))
    print(f"{out}: {choice.preset}; next: python -m pipeline.train {out} --dry-run")


if __name__ == "__main__":
    main()
