"""`python -m data_prep COMMAND DATASET.yaml`: the preparation of a dataset, one command a step."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.config import DatasetConfig, load_dataset
from data_prep.dataset.snapshot import collect_garbage, take_snapshot, verify
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import check_settings, run_plan
from data_prep.store.store import Store, open_store
from model.common.errors import UserError, command
from model.common.share import Share

Arguments = argparse.Namespace


def plan(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Scan the sources, filter, find duplicates, and decide which sample is which row of which part."""
    manifest = run_plan(config, dataset, arguments.task)
    if manifest is not None:
        _load("data_prep.plan.budget", "print_budget")(config, dataset, manifest, arguments.gpu_tflops)


def pairs(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Make the planned pairs: images of their bucket's size with captions, part by part."""
    run_pairs(config, dataset, arguments.task)


def latents(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Encode the pairs' images with a VAE, as a latents family."""
    check_settings(config, dataset)
    run_latents = _load("data_prep.families.latents", "run_latents")
    for entry in _chosen(config.latents, arguments.family, "latents"):
        run_latents(config, entry, dataset, arguments.task)


def text(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Encode the pairs' captions with an LLM, as a text family."""
    check_settings(config, dataset)
    run_text = _load("data_prep.families.text", "run_text")
    for entry in _chosen(config.text, arguments.family, "text"):
        run_text(config, entry, dataset, arguments.task)
        _load("data_prep.families.text_report", "print_text_report")(dataset, entry.name, arguments.task)


def snapshot(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Freeze what a training run reads: the parts that exist in all families."""
    check_settings(config, dataset)
    taken = take_snapshot(dataset, arguments.families, arguments.partial)
    rows = sum(bucket["rows"] for bucket in taken.buckets.values())
    print(f"snapshot {taken.id}: {rows:,} pairs, families {', '.join(sorted(taken.families))}")


def verify_dataset(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Check what is committed: every file is there with its size, and with --deep its hash."""
    check_settings(config, dataset)
    found = verify(dataset, arguments.deep)
    for kind, parts in sorted(found.parts.items()):
        print(f"{kind}: {parts:,} parts are right, {found.bytes[kind]:,} bytes")
    for problem in found.problems:
        print(f"problem: {problem}")
    if found.problems:
        raise UserError(f"{dataset.uri}: {len(found.problems)} problems, each named above with its way out")


def report(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Write an HTML page: counts from source to commit, histograms, samples, what was dropped and why."""
    check_settings(config, dataset)
    _load("data_prep.report", "write_report")(config, dataset, arguments.out or Path("runs") / f"{config.name}_data.html")


def gc(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """List files that no commit names, left by killed tasks; with --delete remove them."""
    garbage = collect_garbage(dataset, arguments.older_than_hours, arguments.delete)
    for key in garbage:
        print(key)
    print(f"{len(garbage):,} files " + ("removed" if arguments.delete else "would be removed: add --delete"))


COMMANDS: dict[str, tuple[Callable[[DatasetConfig, Store, Arguments], None], str]] = {
    "plan": (plan, "plan data_prep/datasets/demo.yaml --gpu-tflops 400"),
    "pairs": (pairs, "pairs data_prep/datasets/demo.yaml --task 3/64"),
    "latents": (latents, "latents data_prep/datasets/demo.yaml --family latents"),
    "text": (text, "text data_prep/datasets/demo.yaml --family smollm2"),
    "snapshot": (snapshot, "snapshot data_prep/datasets/demo.yaml --families latents,smollm2"),
    "verify": (verify_dataset, "verify data_prep/datasets/demo.yaml --deep"),
    "report": (report, "report data_prep/datasets/demo.yaml --out runs/demo_data.html"),
    "gc": (gc, "gc data_prep/datasets/demo.yaml --older-than-hours 48 --delete"),
}
NOTES = {
    "plan": [
        "The last task to scan finds the duplicates, in under 1 GB of memory; for 1 billion pairs it needs 33 GB of disk below",
        "TMPDIR (see data_prep/plan/dedupe.py).",
        "",
    ]
}
SHARED = ("plan", "pairs", "latents", "text")
"""Commands whose work an array of tasks can share."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Prepare a dataset of image-caption pairs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, example) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            epilog="\n".join([*NOTES.get(name, []), f"example: python -m data_prep {example}"]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("dataset", type=Path, metavar="DATASET.yaml", help="the dataset's settings")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as buckets.resolution=512")
        if name in SHARED:
            sub.add_argument(
                "--task",
                metavar="I/N",
                help="do the I-th of N shares (from 0); default: this Slurm array task's, else everything",
            )
    _add(
        commands, "plan", "--gpu-tflops", type=float, default=400.0, help="sustained rate for the GPU-hours printed (default 400)"
    )
    _add(commands, "latents", "--family", help="only the latents family of this name")
    _add(commands, "text", "--family", help="only the text family of this name")
    _add(
        commands,
        "snapshot",
        "--families",
        type=lambda names: names.split(","),
        help="families to include, A,B (default: all registered)",
    )
    _add(commands, "snapshot", "--partial", action="store_true", help="take the parts that are complete, leave out the others")
    _add(commands, "verify", "--deep", action="store_true", help="read everything and compare hashes")
    _add(commands, "report", "--out", type=Path, help="where to write the page (default runs/<name>_data.html)")
    _add(
        commands,
        "gc",
        "--older-than-hours",
        type=float,
        default=24.0,
        help="spare younger files: tasks may still run (default 24)",
    )
    _add(commands, "gc", "--delete", action="store_true", help="remove the files instead of listing them")
    return parser


def _add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, flag: str, **options: object) -> None:
    commands.choices[name].add_argument(flag, **options)  # type: ignore[arg-type]


def _load(module: str, name: str) -> Callable[..., Any]:
    """A step's function, imported when it is run: torch and transformers take seconds that other steps need not wait for."""
    return getattr(importlib.import_module(module), name)


def _chosen(entries: list[Any], name: str | None, kind: str) -> list[Any]:
    chosen = [entry for entry in entries if name in (None, entry.name)]
    if not chosen:
        there = ", ".join(entry.name for entry in entries) or "none"
        raise UserError(f"no {kind} family {name or ''} in the dataset's YAML (there is: {there}): add it to `{kind}`")
    return chosen


def parse(argv: list[str] | None) -> Arguments:
    """Parse a command line; `key=value` may stand before or behind the options."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    stray = [word for word in [*arguments.overrides, *rest] if word.startswith("-") or "=" not in word]
    if stray:
        parser.error(f"not understood: {' '.join(stray)}; settings are changed with key=value")
    arguments.overrides += rest
    if arguments.command in SHARED:
        arguments.task = Share.parse(arguments.task) if arguments.task else Share.from_environment()
    return arguments


@command
def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    config = load_dataset(arguments.dataset, arguments.overrides)
    store = open_store(config.store, create=arguments.command == "plan")
    COMMANDS[arguments.command][0](config, store.sub(config.name), arguments)


if __name__ == "__main__":
    main()
    # The interpreter's own exit aborts now and then while pyarrow's threads still run: all is written, so leave at once.
    sys.stdout.flush()
    os._exit(0)
