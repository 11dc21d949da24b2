"""Measure how fast a network learns to follow prompts: a speedrun on exact scenes, with nothing to download.

    python -m pipeline.speedrun run NAME [key=value ...] --track cpu --change "what is new"
    python -m pipeline.speedrun check benchmarks/results/speedrun/NAME.json [--replay]
    python -m pipeline.speedrun board

`run` prepares the data if they are missing, trains the track's stage with the given settings once per seed,
scores it as it goes on until it reaches the target, and writes the record. `check` reads a record, refuses
one that breaks a rule or whose seconds do not follow from its log, and with --replay trains its first steps
again and compares losses.
`board` writes the leaderboard and the learning curves from all records.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import yaml

from model.common.errors import UserError, command
from model.common.settings import check_name
from pipeline.demonstration.commands import run as run_command
from pipeline.runtime.console import log_line
from pipeline.runtime.finished import is_finished
from pipeline.runtime.launch import start_ranks, wait_for
from pipeline.runtime.run_log import read_reports
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.speedruns.board import write_board
from pipeline.speedruns.record import (
    Record,
    has_reached,
    mean_seconds,
    read_checked,
    read_log,
    seconds_to_target,
    write_record,
)
from pipeline.speedruns.track import MIN_SEEDS, TRACKS, Track, changed_settings, find_track, load_entry

RECORDS = Path("benchmarks/results/speedrun")
DATASETS = Path(__file__).parents[1] / "data_prep" / "datasets"
STEPS = ("plan", "pairs", "latents", "text", "snapshot")
SAME = 0.02
"""Relative difference of a replayed loss that other hardware may make."""


def prepare(track: Track) -> None:
    """Make the track's data, if there is no snapshot of them.

    Raises:
        SystemExit: with the exit code of a step that failed; it has printed the reason.
    """
    path = DATASETS / track.dataset
    settings = yaml.safe_load(path.read_text())
    if not any(Path(settings["store"], settings["name"], "snapshots").glob("*")):
        for step in STEPS:
            run_command("data_prep", step, str(path))


def train(
    track: Track, settings: Sequence[str], run: Path, seed: int, processes: int, reports: int = 0
) -> None:
    """Train one seed to the target or to its end, from where it was stopped.

    Args:
        track: the track.
        settings: of the entry.
        run: folder of the run.
        seed: `data.seed`.
        processes: number of ranks.
        reports: stop after this many reports; 0 = at the target.

    Raises:
        SystemExit: with the trainer's exit code; the trainer has printed the reason.
    """
    stage = load_entry(track, settings)
    if is_finished(run, stage.samples) or has_reached(read_log(run, seed)):
        return

    words = [track.stage, *settings, f"name={run.name}", f"runs={run.parent}", f"data.seed={seed}"]
    ranks = start_ranks(processes, *words)

    def is_enough() -> bool:
        return len(read_reports(run)) >= reports if reports else has_reached(read_log(run, seed))

    def stop_early() -> None:
        if is_enough():
            for rank in ranks:
                rank.terminate()

    code = wait_for(ranks, 0, EXIT_AGAIN, meanwhile=stop_early)
    if code and not is_enough():
        sys.exit(code)


def run_entry(arguments: argparse.Namespace) -> None:
    """Train all seeds and write the record."""
    check_name("NAME", arguments.name)
    track, settings = find_track(arguments.track), arguments.settings
    stage = load_entry(track, settings)
    log_line(f"changed: {', '.join(changed_settings(track, settings)) or 'nothing'}")

    prepare(track)

    folder = Path(stage.runs) / "speedrun" / arguments.name
    runs = []
    for seed in range(arguments.seeds):
        run = folder / f"seed_{seed}"
        train(track, settings, run, seed, arguments.processes)
        runs.append(read_log(run, seed))

        seconds = seconds_to_target(runs[-1])
        reached = "target missed" if seconds is None else f"target after {seconds / 60:.1f} minutes"
        best = max((scores["segment"] for scores in runs[-1]["scores"]), default=0.0)
        log_line(f"seed {seed}: {reached}, best {best:.1%} of segments")

    record: Record = {
        "format": 1,
        "track": arguments.track,
        "name": arguments.name,
        "change": arguments.change,
        "settings": settings,
        "conditions": conditions(),
        "runs": runs,
        "seconds": mean_seconds(runs),
    }

    path = arguments.out / f"{arguments.name}.json"
    write_record(path, record)
    log_line(f"{path}: {'no record' if record['seconds'] is None else 'check it, and write the board'}")


def replay(record: Record, folder: Path, processes: int) -> None:
    """Train a record's first seed up to its first report again, and compare the loss.

    Raises:
        UserError: if it differs by more than other hardware explains.
    """
    track, log = find_track(record["track"]), record["runs"][0]
    prepare(track)

    first = log["reports"][0]
    train(track, record["settings"], folder, log["seed"], processes, reports=1)

    loss = read_reports(folder)[0]["loss"]
    said = f"loss {loss:.6f} after {first['samples']:,} samples, the log says {first['loss']:.6f}"
    if abs(loss - first["loss"]) > SAME * first["loss"]:
        raise UserError(f"replayed: {said}: the settings or the data are not those of the record")
    log_line(f"replayed: {said}")


def conditions() -> str:
    """Return date, hardware and versions."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{date.today()}; {hardware}; torch {torch.__version__}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.speedrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train, score and write the record")
    run.add_argument("name", metavar="NAME")
    run.add_argument("settings", nargs="*", metavar="key=value", help="settings that the entry changes")
    run.add_argument("--track", choices=tuple(TRACKS), default="cpu")
    run.add_argument("--change", required=True, help="what is new, in a sentence")
    run.add_argument("--seeds", type=int, default=MIN_SEEDS)
    run.add_argument("--processes", type=int, default=2, help="ranks of a run (default 2: one per core)")
    run.add_argument("--out", type=Path, default=RECORDS, help=f"folder of the record (default {RECORDS})")

    check = commands.add_parser("check", help="check a record's rules and seconds")
    check.add_argument("record", type=Path, metavar="RECORD.json")
    check.add_argument("--replay", action="store_true", help="train its first steps again")
    check.add_argument("--processes", type=int, default=2)

    board = commands.add_parser("board", help="write the leaderboard")
    board.add_argument("--out", type=Path, default=RECORDS)

    return parser.parse_args(words)


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    if arguments.command == "run":
        run_entry(arguments)
    elif arguments.command == "check":
        record = read_checked(arguments.record)
        log_line(f"{arguments.record}: {record['seconds']:.1f} seconds, as its log says")
        if arguments.replay:
            with tempfile.TemporaryDirectory() as folder:
                replay(record, Path(folder) / "replay", arguments.processes)
    else:
        records = [read_checked(path) for path in sorted(arguments.out.glob("*.json"))]
        path = arguments.out.parent / "speedrun.md"
        write_board(path, records)
        log_line(f"{path}: {len(records)} records")


if __name__ == "__main__":
    main()
