"""Rates of one GPU at the work of this project, as one table in at most nine minutes.

    python -m benchmarks.gpu_probe --out FOLDER                    # on an H100 or H200
    python -m benchmarks.gpu_probe --out FOLDER --only machine,ceilings
    python -m benchmarks.gpu_probe --out FOLDER --tiny             # every phase on a CPU, in tiny sizes

Each phase runs in a process of its own: an error, even one that a GPU does not recover from, ends that phase
alone, and its memory is free for the next. A result is a line of `FOLDER/results.jsonl` as soon as it is
known. What a machine lacks is a line too. The exit code is 1 if a phase failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from benchmarks import gpu_kernels, gpu_training
from benchmarks.gpu_timing import OutOfTime, Probe, missing_package, write_line
from benchmarks.reporting import Goal, at_least, at_most, conditions, print_goals

GRACE_SECONDS = 8.0
"""Time after its deadline at which a phase is ended by force: a deadline is checked between measurements."""
FAILED = 3
"""Exit code of a phase that has recorded errors; 1 is what Python itself ends with."""
USUAL = ("phase", "what", "value", "unit", "skipped", "error", "at_least", "at_most")


class Phase(NamedTuple):
    """A part of the probe."""

    name: str
    seconds: float
    """Time allowed."""
    run: Callable[[Probe], None]


PHASES = [
    Phase("machine", 15, gpu_kernels.machine),
    Phase("parity", 20, gpu_kernels.parity),
    Phase("ceilings", 35, gpu_kernels.ceilings),
    Phase("self_attention", 45, gpu_kernels.self_attention),
    Phase("cross_attention", 35, gpu_kernels.cross_attention),
    Phase("block", 75, gpu_kernels.one_block),
    Phase("engine_256", 100, gpu_training.engine_256),
    Phase("engine_1024", 80, gpu_training.engine_1024),
    Phase("feeding", 20, gpu_training.feeding),
    Phase("pixart", 70, gpu_training.pixart),
    Phase("encoder", 45, gpu_training.encoder),
]
"""The phases in order; what others depend on for their meaning comes first."""


# -- one phase -----------------------------------------------------------------------------------------------


def run_alone(phase: Phase, out: Path, seconds: float, tiny: bool) -> NoReturn:
    """Run a phase, and end this process: with `FAILED` if something failed, else with 0."""
    # A group of its own, so that what the phase starts ends with it, such as the compiler's workers.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.manual_seed(0)
    probe = Probe(phase.name, out, seconds, tiny)
    began = time.monotonic()
    try:
        phase.run(probe)
    except OutOfTime as late:
        probe.reason("the rest", str(late))
    except Exception as error:
        package = missing_package(error)
        if package:
            probe.reason("all", f"the package {package} is not installed")
        else:
            probe.failed("all", error)

    probe.result("time of the phase", time.monotonic() - began, "s")
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the shutdown of threads and process groups, which can hang.
    os._exit(FAILED if probe.failures else 0)


def run_phase(phase: Phase, out: Path, seconds: float, tiny: bool) -> bool:
    """Run a phase in a process of its own.

    Args:
        phase: the phase.
        out: folder of the results.
        seconds: time until its deadline.
        tiny: True for tiny sizes.

    Returns:
        True if nothing failed.
    """
    # A fork has all modules already. This process never uses the GPU: its copies could not.
    process: BaseProcess = multiprocessing.get_context("fork").Process(
        target=run_alone, args=(phase, out, seconds, tiny)
    )
    process.start()
    try:
        process.join(seconds + GRACE_SECONDS)
        code = process.exitcode
    finally:
        end_group(process)

    if code is None:
        why = f"did not end within {GRACE_SECONDS:.0f} s after its deadline of {seconds:.0f} s"
    elif code in (0, FAILED):
        return code == 0
    else:
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with the code {code}"
    write_line(out, {"phase": phase.name, "what": "all", "error": f"the process {why}"})
    return False


def end_group(process: BaseProcess) -> None:
    """End a phase's process and all that it has started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has left nothing, or has been started this moment and has no group yet.
        process.kill()
    process.join()


def has_gpu() -> bool:
    """Return True if there is a GPU. Another process looks for it, so that this one can still be forked."""
    process = multiprocessing.get_context("fork").Process(target=_exit_with_gpu)
    process.start()
    process.join()
    return process.exitcode == 0


def _exit_with_gpu() -> NoReturn:
    os._exit(0 if torch.cuda.is_available() else 1)


def run_all(phases: Sequence[Phase], out: Path, minutes: float, tiny: bool) -> bool:
    """Run phases one after another; return True if none failed.

    Args:
        phases: in this order.
        out: folder of the results.
        minutes: time for all; a phase that would start at their end is skipped.
        tiny: True for tiny sizes.
    """
    end = time.monotonic() + 60 * minutes
    succeeded = True
    for phase in phases:
        left = end - time.monotonic()
        if left <= GRACE_SECONDS:
            why = f"the {minutes:g} minutes of the probe are over"
            write_line(out, {"phase": phase.name, "what": "all", "skipped": why})
            continue
        succeeded &= run_phase(phase, out, min(phase.seconds, left - GRACE_SECONDS), tiny)
    return succeeded


# -- the report ----------------------------------------------------------------------------------------------


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of results so far."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results as a table in Markdown."""
    rows = ["| phase | measurement | value | details |", "|---|---|---|---|"]
    for line in lines:
        if "value" in line:
            value = f"{line['value']:g} {line['unit']}".strip()
        elif "skipped" in line:
            value = f"not measured: {line['skipped']}"
        else:
            value = f"**failed**: {line['error']}"

        details = []
        for name, detail in line.items():
            if name not in USUAL:
                details.append(f"{name} {detail:.4g}" if isinstance(detail, float) else f"{name} {detail}")
        cells = [line["phase"], line["what"], value, "; ".join(details)]
        rows.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return rows


def goals_of(lines: Sequence[dict[str, Any]]) -> dict[str, Goal]:
    """Return the results that have a bound as goals."""
    goals = {}
    for line in lines:
        name = f"{line['phase']}: {line['what']}"
        if "at_least" in line:
            goals[name] = at_least(line["value"], line["at_least"])
        elif "at_most" in line:
            goals[name] = at_most(line["value"], line["at_most"])
    return goals


def report(out: Path) -> None:
    """Print the table, the goals, and last the line of JSON; keep the table beside the results."""
    lines = read_lines(out)
    goals = goals_of(lines)
    text = ["# One GPU", "", f"{conditions()}; random data, medians.", "", *table(lines), ""]
    text += [f"{what}: {goal}." for what, goal in goals.items()]
    (out / "results.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    failed = sorted({line["phase"] for line in lines if "error" in line})
    print_goals("gpu_probe", goals, failed=failed)


# -- the command ---------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [phase.name for phase in PHASES]
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--only", metavar="A,B", help=f"phases to run, of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all phases")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, which a CPU measures in seconds")
    options = parser.parse_args(arguments)

    options.phases = PHASES
    if options.only is not None:
        wanted = options.only.split(",")
        if unknown := sorted(set(wanted) - set(names)):
            parser.error(f"--only {','.join(unknown)}: no such phase, there are {', '.join(names)}")
        options.phases = [phase for phase in PHASES if phase.name in wanted]
    if not options.tiny and not has_gpu():
        parser.error("there is no GPU: add --tiny to try all phases on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.gpu_probe`; returns the exit code."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").unlink(missing_ok=True)
    # `timeout` sends this signal: the phase is ended, and what is known is reported.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        succeeded = run_all(options.phases, options.out, options.minutes, options.tiny)
    finally:
        report(options.out)
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
