"""What a cluster job knows about its own past: each start of a run, how it ended, and whether it may be started again.

`cluster/train.sh` calls this before and after the ranks; people read the result with `python -m pipeline.status`.

    python -m pipeline.operations.attempts begin STAGE [key=value ...]      prints the run's folder
    python -m pipeline.operations.attempts end RUN --rc 137 --job "$(scontrol show job -o $SLURM_JOB_ID)"

`begin` ends with 0, 3 (the stage is finished: nothing to do) or 2 (something to be put right). `end` ends with what the job
should do: 85 requeue itself, 0 the stage is finished, 2 something to be put right, 1 anything else that should not be repeated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from model.common.errors import UserError, command
from model.common.files import write_atomic
from pipeline.operations.first_error import find_first_error
from pipeline.runtime.attempt import Attempt, read_attempt
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import StageConfig, load_stage

FINISHED = 3
MAX_CRASHES = 3
"""A crash at the same step for this time in a row ends the run."""
MAX_STOPS = 10
"""So does a stop without one step of progress for this time in a row: the time limit is shorter than a start."""
MAX_BAD_NODES = 5
"""Starts in a row that may fail the preflight before the run gives up."""
SMALL_DIT = 100_000_000
"""A stage whose DiT has more parameters than this needs GPUs."""


@dataclass
class Ending:
    """How an attempt ended, and what follows; one line of `attempts.jsonl`."""

    job: str
    restart: int
    nodes: str
    started: float
    ended: float
    kind: str
    """`finished`, `stop` (saved and wants to go on), `crash`, `lost` (its node died), `outside` (requeued by another),
    `bad_node`, `cancelled`, `user_error`."""
    reason: str
    step: int
    requeued: bool


def read_endings(run: Path) -> list[Ending]:
    """How the attempts so far ended, oldest first."""
    path = run / "attempts.jsonl"
    return [Ending(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _write_ending(run: Path, ending: Ending) -> None:
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(asdict(ending)) + "\n")


def progress(run: Path) -> int:
    """The step that a run has reached: its last report, or its newest checkpoint if that is later; 0 before either."""
    reached = [int(path.name.split("_")[1]) for path in (run / "checkpoints").glob("step_*") if (path / "manifest.json").exists()]
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
        steps = [int(match[1]) for line in lines if (match := re.search(r'"step": ?(\d+)', line))]
        reached += steps[-1:]
    return max(reached, default=0)


def needs_gpu(stage: StageConfig) -> bool:
    """Whether a stage is too large for CPUs: 18 depth width^2 parameters of the DiT (attention 4, MLP 8, modulation 6)."""
    dit = stage.dit(channels=16)
    return 18 * dit.depth * dit.width**2 > SMALL_DIT


def queue_state(job: str) -> str:
    """State of a job in Slurm's queue, such as RUNNING; empty when it is not there any more."""
    done = subprocess.run(
        ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip()


def _seconds(text: str) -> float:
    """Slurm's `[days-]hours:minutes:seconds`; UNLIMITED is infinite."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return float("inf")
    days, _, clock = text.rpartition("-")
    total = 0
    for number in clock.split(":"):
        total = total * 60 + int(number)
    return total + 86400 * int(days or 0)


def who_ended(job: str, restart: int) -> Literal["itself", "outside", "time", "user"]:
    """Who ended a job, by its line in `scontrol show job -o` while its batch script still runs.

    Slurm calls a job COMPLETING from the moment that it was cancelled, requeued or out of time; which of them, only
    the other fields tell.
    """
    fields = dict(re.findall(r"(\S+?)=(\S*)", job))
    if fields.get("JobState", "RUNNING") == "RUNNING":
        return "itself"
    if int(fields.get("Restarts", restart)) > restart:
        return "outside"
    return "time" if _seconds(fields.get("RunTime", "0")) >= _seconds(fields.get("TimeLimit", "")) else "user"


def begin(stage: StageConfig, attempt: Attempt, gpus: int) -> Path:
    """Open an attempt at a stage.

    Raises:
        UserError: the stage needs GPUs and has none, another job is at the run, or the run was asked to stop.
    """
    run = stage.run
    if needs_gpu(stage) and not gpus:
        raise UserError(f"{stage.name} needs GPUs and the job has none: add --gpus-per-node=8 (or what the nodes have)")
    if (run / "stop").exists():
        raise UserError(f"{run / 'stop'} asks this run to stop: remove the file to go on")
    before = read_attempt(run)
    if before is not None and before.job != attempt.job:
        state = queue_state(before.job)
        if state in ("RUNNING", "COMPLETING", "SUSPENDED", "PENDING", "CONFIGURING", "REQUEUED"):
            raise UserError(f"job {before.job} is already at {run} ({state}): `scancel {before.job}` first, or give name=...")
    endings = read_endings(run)
    if before is not None and before.name not in {f"{ending.job}.{ending.restart}" for ending in endings}:
        reason = "the job ended without a word: its node died, or it was killed or requeued from outside"
        kept = {"job": before.job, "restart": before.restart, "nodes": before.nodes, "started": before.started}
        _write_ending(run, Ending(**kept, ended=time.time(), kind="lost", reason=reason, step=progress(run), requeued=True))
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    attempt.log_sizes = {path.name: path.stat().st_size for path in logs.glob("*.txt")}
    if attempt.output:
        link = logs / f"job_{attempt.job}.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(attempt.output)
    write_atomic(run / "attempt.json", json.dumps(asdict(attempt)))
    return run


def _in_a_row(endings: list[Ending], step: int, kinds: set[str]) -> int:
    """How many of the last endings were of these kinds at this step; what stood in the way of a start is passed over."""
    count = 0
    for ending in reversed([ending for ending in endings if ending.kind != "bad_node"]):
        if ending.kind not in kinds or ending.step != step:
            break
        count += 1
    return count


def judge(run: Path, rc: int, ended_by: str, why: str, bad_nodes: str) -> tuple[str, str, bool]:
    """Decide what the end of an attempt means.

    Args:
        run: the run's folder.
        rc: exit code: the ranks' own where one said 0, 2 or 85, see `exit_code`.
        ended_by: see `who_ended`.
        why: what the batch script did to the ranks itself, or empty.
        bad_nodes: nodes that failed the preflight.

    Returns:
        kind and reason of the ending, and whether the job should be requeued.
    """
    step, endings = progress(run), read_endings(run)
    if rc == 0 and not bad_nodes:
        return "finished", "the stage is finished", False
    if ended_by == "outside":
        return "outside", "requeued from outside" + (", after saving a checkpoint" if rc == EXIT_AGAIN else ""), False
    if ended_by == "user":
        return "cancelled", "cancelled" + (", after saving a checkpoint" if rc == EXIT_AGAIN else ""), False
    if bad_nodes:
        repeated = 1 + next((i for i, ending in enumerate(reversed(endings)) if ending.kind != "bad_node"), len(endings))
        return "bad_node", f"preflight failed on {bad_nodes}", repeated < MAX_BAD_NODES
    if rc == 2:
        return "user_error", "something is to be put right, see the error", False
    if rc == EXIT_AGAIN:
        reason = _stop_reason(run)
        if (run / "stop").exists():
            return "stop", f"the file {run / 'stop'} asked for it; remove it and submit again to go on", False
        repeated = 1 + _in_a_row(endings, step, {"stop"})
        if repeated >= MAX_STOPS:
            return "stop", f"{reason}: stopped {repeated} times at step {step}, is the time limit too short for a start?", False
        return "stop", reason, True
    repeated = 1 + _in_a_row(endings, step, {"crash", "lost"})
    if ended_by == "time":
        why = why or "out of time before all ranks had saved: give --signal a longer lead"
    reason = why or (f"killed by signal {rc - 128}" if rc > 128 else f"crashed with exit code {rc}")
    if repeated >= MAX_CRASHES:
        return "crash", f"{reason}; that is {repeated} times at step {step}, so it is not started again", False
    return "crash", reason, True


def _stop_reason(run: Path) -> str:
    """Why the trainer stopped, by its last `stop` event."""
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            found = re.findall(rb'"event": "stop".*"reason": "([^"]*)"', file.read())
        if found:
            return f"saved and left after {found[-1].decode()}"
    return "saved and left"


def exit_code(run: Path, rc: int, attempt: Attempt) -> int:
    """The ranks' own exit code: srun reports the largest, which is 137 where it killed the others after the first had left.

    A rank leaves with 85 only after the checkpoint is committed on all ranks, so one 85 stands for all. A rank killed by
    SIGUSR1 had not yet begun: it too was asked to stop.
    """
    log = run / "logs" / "srun.txt"
    if not log.exists():
        return rc
    text = log.read_bytes()[attempt.log_sizes.get(log.name, 0) :].decode(errors="replace")
    codes = {int(code) for code in re.findall(r"tasks? [\d,-]+: Exited with exit code (\d+)", text)}
    if "User defined signal 1" in text or rc == 138:
        codes.add(EXIT_AGAIN)
    return next((code for code in (EXIT_AGAIN, 2) if code in codes), rc)


def end(run: Path, rc: int, job: str, why: str, bad_nodes: str) -> int:
    """Write down how the attempt ended, tell it on stdout, and return what the job should do."""
    attempt = read_attempt(run)
    if attempt is None:
        raise UserError(f"{run}: no attempt.json; call `begin` first")
    rc = exit_code(run, rc, attempt) if not why and not bad_nodes else rc
    kind, reason, requeue = judge(run, rc, who_ended(job, attempt.restart), why, bad_nodes)
    step = progress(run)
    kept = {"job": attempt.job, "restart": attempt.restart, "nodes": attempt.nodes, "started": attempt.started}
    _write_ending(
        run, Ending(**kept, ended=time.time(), kind=kind, reason=reason, step=step, requeued=requeue or kind == "outside")
    )
    if kind in ("crash", "user_error"):
        found = find_first_error(run / "logs", attempt.log_sizes)
        print(f"== first error: {found}" if found else f"== no rank wrote an error; logs are in {run / 'logs'}")
    print(f"== {run.name}: {reason} (step {step}, job {attempt.name}); {'requeued' if requeue else 'not requeued'}", flush=True)
    return EXIT_AGAIN if requeue else {"finished": 0, "cancelled": 0, "user_error": 2}.get(kind, 1)


def from_environment() -> Attempt:
    """The attempt that this batch job makes."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID", "0")
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Attempt(job, restart, environment.get("SLURM_JOB_NODELIST", ""), time.time(), environment.get("JOB_OUTPUT", ""))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.attempts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    opening = commands.add_parser("begin", help="open an attempt; prints the run's folder")
    opening.add_argument("stage")
    opening.add_argument("overrides", nargs="*", metavar="key=value")
    closing = commands.add_parser("end", help="close it, and say what the job should do")
    closing.add_argument("run", type=Path)
    closing.add_argument("--rc", type=int, default=0, help="exit code of srun")
    closing.add_argument("--job", default="", help="the job, as `scontrol show job -o` tells it")
    closing.add_argument("--why", default="", help="what the batch script itself did to the ranks")
    closing.add_argument("--bad-nodes", default="", help="nodes that failed the preflight")
    return parser.parse_args()


@command
def main() -> None:
    """Entry of `python -m pipeline.operations.attempts`."""
    arguments: Any = parse()
    if arguments.command == "end":
        sys.exit(end(arguments.run, arguments.rc, arguments.job, arguments.why, arguments.bad_nodes))
    stage = load_stage(arguments.stage, arguments.overrides)
    if (stage.run / "finished.json").exists():
        print(f"{stage.name}: already finished, see {stage.run}; give name=... to train it anew", file=sys.stderr)
        sys.exit(FINISHED)
    print(begin(stage, from_environment(), int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))))


if __name__ == "__main__":
    main()
