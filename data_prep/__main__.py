"""`python -m data_prep COMMAND DATASET.yaml`: prepare a dataset, one command per step."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.config import DatasetConfig, load_dataset
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.engines import ENGINES, Ray, connected
from data_prep.families.complete import already_encoded, latents_settings, text_settings
from data_prep.init import add_options as add_init_options
from data_prep.init import init
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import check_settings, run_plan
from data_prep.store.store import Store, open_store
from model.common.errors import UserError, command, one_line
from model.common.share import Share

Arguments = argparse.Namespace


def plan(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Scan the sources, filter, find duplicates, and assign every sample to a row of a part."""
    manifest = run_plan(config, dataset, arguments.task)
    # None while other tasks still scan: the last one prints the budget.
    if manifest is not None:
        _load("data_prep.plan.budget", "print_budget")(config, dataset, manifest, arguments.gpu_tflops)


def annotate(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Let models look at the scanned images, for filters on their columns; between two runs of plan."""
    _load("data_prep.annotators.step", "run_annotations")(
        config, dataset, arguments.task, arguments.allow_functions
    )


def pairs(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Make the planned pairs, images of their bucket's size with captions, part by part."""
    run_pairs(config, dataset, arguments.task)


def latents(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Encode the pairs' images with a VAE, as a latents family."""
    check_settings(config, dataset)
    for entry in _choose(config.latents, arguments.family, "latents"):
        if already_encoded(dataset, entry.name, latents_settings(entry), arguments.task):
            print(f"{entry.name}: all parts of this task are encoded")
        else:
            _load("data_prep.families.latents", "run_latents")(config, entry, dataset, arguments.task)
        if entry.moments == "mean":
            _load("data_prep.families.latents_report", "print_missing_noise")(dataset, entry.name)


def captions(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Write captions of the pairs' images with a vision-language model, as a captions family."""
    check_settings(config, dataset)
    for entry in _choose(config.captions, arguments.family, "captions"):
        try:
            _load("data_prep.families.captions", "run_captions")(entry, dataset, arguments.task)
        finally:
            _load("data_prep.families.captions_report", "print_captions_report")(
                dataset, entry.name, arguments.task
            )


def text(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Encode the pairs' captions with an LLM, as a text family."""
    check_settings(config, dataset)
    for entry in _choose(config.text, arguments.family, "text"):
        if already_encoded(dataset, entry.name, text_settings(dataset, entry), arguments.task):
            print(f"{entry.name}: all parts of this task are encoded")
        else:
            _load("data_prep.families.text", "run_text")(config, entry, dataset, arguments.task)
        _load("data_prep.families.text_report", "print_text_report")(dataset, entry.name, arguments.task)


def users(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Number the users of the pairs, by the column that `users.column` names; with --forget, delete one."""
    check_settings(config, dataset)
    if arguments.forget is not None:
        number = _load("data_prep.dataset.users", "forget_user")(dataset, arguments.forget)
        print(
            f"user {number}: the name and the index entries are deleted; take a new snapshot, and remove "
            f"its row from weights with `python -m pipeline.forget_user RUN {number}`"
        )
        return
    counts = _load("data_prep.pairs.users", "run_users")(config, dataset)
    few, many = min(counts.values()), max(counts.values())
    print(f"{len(counts):,} users of {sum(counts.values()):,} pairs, {few:,} to {many:,} each")


def snapshot(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Take a snapshot for training runs: the parts that exist in all families."""
    check_settings(config, dataset)
    result = take_snapshot(dataset, arguments.families, arguments.partial)
    rows = sum(bucket["rows"] for bucket in result.buckets.values())
    print(f"snapshot {result.id}: {rows:,} pairs, families {', '.join(sorted(result.families))}")


def verify_dataset(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Check all committed files: that they exist and have their size and, with --deep, their hash."""
    check_settings(config, dataset)
    result = verify(dataset, arguments.deep, arguments.task)
    for kind, parts in sorted(result.parts.items()):
        print(f"{kind}: {parts:,} parts are right, {result.bytes[kind]:,} bytes")
    for problem in result.problems:
        print(f"problem: {one_line(problem)}")
    print(f"not looked at: {result.not_read}")

    if result.problems:
        raise UserError(f"{dataset.uri}: {len(result.problems)} problems, each named above with its way out")


def report(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """Write an HTML page: counts from source to commit, histograms, samples, rows dropped by reason."""
    check_settings(config, dataset)
    path = arguments.out or Path("runs") / f"{config.name}_data.html"
    _load("data_prep.report", "write_report")(config, dataset, path)


def gc(config: DatasetConfig, dataset: Store, arguments: Arguments) -> None:
    """List the files that no commit names, left by killed tasks; with --delete, remove them."""
    garbage = collect_garbage(dataset, arguments.older_than_hours, arguments.delete)
    for key in garbage:
        print(one_line(key))
    print(f"{len(garbage):,} files " + ("removed" if arguments.delete else "would be removed: add --delete"))


COMMANDS: dict[str, tuple[Callable[[DatasetConfig, Store, Arguments], None], str]] = {
    "plan": (plan, "plan data_prep/datasets/demo.yaml --gpu-tflops 400"),
    "annotate": (annotate, "annotate data_prep/datasets/paper.yaml --task 3/64"),
    "pairs": (pairs, "pairs data_prep/datasets/demo.yaml --task 3/64"),
    "latents": (latents, "latents data_prep/datasets/demo.yaml --family latents"),
    "captions": (captions, "captions my_data.yaml --family captions --task 3/64"),
    "text": (text, "text data_prep/datasets/demo.yaml --family smollm2"),
    "users": (users, "users my_data.yaml users.column=artist users.min_images=8"),
    "snapshot": (snapshot, "snapshot data_prep/datasets/demo.yaml --families latents,smollm2"),
    "verify": (verify_dataset, "verify data_prep/datasets/demo.yaml --deep --task 3/16"),
    "report": (report, "report data_prep/datasets/demo.yaml --out runs/demo_data.html"),
    "gc": (gc, "gc data_prep/datasets/demo.yaml --older-than-hours 48 --delete"),
}
NOTES = {
    "plan": [
        "Once all files are scanned, the tasks that run share the rest in units (data_prep/plan/finish.py),",
        "each in less than 2 GB of memory. For 1 billion pairs, near duplicates take 8 GB below TMPDIR.",
        "",
    ]
}
SHARED = ("plan", "annotate", "pairs", "latents", "captions", "text", "verify")
"""Commands whose work an array of tasks can share."""
INIT_EXAMPLE = "init s3://bucket/tars --llm qwen --vae black-forest-labs/FLUX.1-dev"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Prepare a dataset of image-caption pairs."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # The one command that writes a dataset's YAML; all others read one.
    first = subparsers.add_parser(
        "init",
        help=init.__doc__,
        description=init.__doc__,
        epilog=f"example: python -m data_prep {INIT_EXAMPLE}",
    )
    first.set_defaults(overrides=[])
    add_init_options(first)

    # Every command has the dataset and overrides; some have options of their own.
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, (run, example) in COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            epilog="\n".join([*NOTES.get(name, []), f"example: python -m data_prep {example}"]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands[name].add_argument(
            "dataset", type=Path, metavar="DATASET.yaml", help="the dataset's settings"
        )
        commands[name].add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="settings to change, such as buckets.resolution=512",
        )

    for name in SHARED:
        commands[name].add_argument(
            "--task",
            metavar="I/N",
            help="do the I-th of N shares (from 0); default: this Slurm array task's, otherwise everything",
        )
        commands[name].add_argument(
            "--engine",
            choices=ENGINES,
            help="who does the work: this process alone, the tasks that share it, or a Ray cluster "
            "(default: share for a task of several, otherwise alone)",
        )
        commands[name].add_argument(
            "--actors",
            type=int,
            metavar="N",
            help="maximum number of workers of a Ray cluster (default: as many as it has room for)",
        )
    _add_options(commands)
    return parser


def _add_options(commands: dict[str, argparse.ArgumentParser]) -> None:
    """Add the options of single commands."""
    commands["plan"].add_argument(
        "--gpu-tflops",
        type=float,
        default=400.0,
        help="sustained rate for the GPU-hours that are printed (default 400)",
    )
    commands["latents"].add_argument("--family", help="only the latents family of this name")
    commands["annotate"].add_argument(
        "--allow-functions",
        action="store_true",
        help="run the functions that `annotations` names, which is code of any module",
    )
    commands["captions"].add_argument("--family", help="only the captions family of this name")
    commands["text"].add_argument("--family", help="only the text family of this name")
    commands["users"].add_argument("--forget", metavar="NAME", help="delete this user's name and number")
    commands["snapshot"].add_argument(
        "--families",
        type=lambda names: names.split(","),
        help="families to include, A,B (default: all registered)",
    )
    commands["snapshot"].add_argument(
        "--partial", action="store_true", help="include the complete parts and leave out the others"
    )
    commands["verify"].add_argument("--deep", action="store_true", help="read everything and compare hashes")
    commands["report"].add_argument(
        "--out", type=Path, help="path of the page (default runs/<name>_data.html)"
    )
    commands["gc"].add_argument(
        "--older-than-hours",
        type=float,
        default=24.0,
        help="keep younger files, since tasks may still be running (default 24)",
    )
    commands["gc"].add_argument(
        "--delete", action="store_true", help="remove the files instead of listing them"
    )


def _load(module: str, name: str) -> Callable[..., Any]:
    """Import a step's function only when it runs: torch and transformers take seconds to import."""
    return getattr(importlib.import_module(module), name)


def _choose(entries: list[Any], name: str | None, kind: str) -> list[Any]:
    """Return the families of this name; all if it is None."""
    chosen = [entry for entry in entries if name in (None, entry.name)]
    if not chosen:
        names = ", ".join(entry.name for entry in entries) or "none"
        raise UserError(
            f"no {kind} family {name or ''} in the dataset's YAML (it has: {names}): add it to `{kind}`"
        )
    return chosen


def parse(argv: list[str] | None) -> Arguments:
    """Parse a command line; `key=value` can come before or after the options."""
    parser = make_parser()
    # argparse leaves positional arguments after an option over
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "init" and rest:
        parser.error(f"not understood: {' '.join(rest)}")
    # A mistyped option ends up in the rest; without this check it would have no effect and no error.
    unknown = [word for word in [*arguments.overrides, *rest] if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}; settings are changed with key=value")
    arguments.overrides += rest

    if arguments.command in SHARED:
        arguments.task = choose_engine(arguments.engine, arguments.task, arguments.actors)
    return arguments


def choose_engine(engine: str | None, task: str | None, actors: int | None) -> Share:
    """Return the engine that the options name.

    Args:
        engine: one of `ENGINES`; None = chosen by the task.
        task: `I/N`; None = from the environment of a Slurm array, otherwise everything.
        actors: maximum number of workers of a Ray cluster.

    Raises:
        UserError: if the options contradict each other.
    """
    share = Share.parse(task) if task else Share.from_environment()
    if engine in ("alone", "ray") and share.count > 1:
        raise UserError(
            f"--engine {engine} does everything, but this is task {share.index} of {share.count}: use "
            "--engine share, or start it once"
        )
    if engine == "share" and not task and "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise UserError("--engine share: add --task I/N, or start it as a task of a Slurm array")
    if actors is not None and (engine != "ray" or actors < 1):
        raise UserError(f"--actors {actors}: give at least 1, with --engine ray")
    return Ray(actors=actors) if engine == "ray" else share


@command
def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    arguments = parse(argv)
    # Logs go to stderr: stdout has only results, such as the keys that `gc` lists.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if arguments.command == "init":
        init(arguments)
        return
    config = load_dataset(arguments.dataset, arguments.overrides)

    # Only the plan can create a store: with a mistyped path, other commands fail.
    store = open_store(config.store, create=arguments.command == "plan")
    with connected(getattr(arguments, "task", None)):
        COMMANDS[arguments.command][0](config, store.sub(config.name), arguments)


if __name__ == "__main__":
    main()
    # The interpreter's own exit sometimes aborts while pyarrow's threads still run. All files are written by
    # now.
    sys.stdout.flush()
    os._exit(0)
