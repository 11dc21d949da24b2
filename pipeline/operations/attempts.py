"""The record of a run's attempts by cluster jobs: their starts, their ends, and whether to start again.

`cluster/train.sh` calls this before and after the ranks. `python -m pipeline.status` shows the result.

    python -m pipeline.operations.attempts begin STAGE [key=value ...]      prints the run's folder
    python -m pipeline.operations.attempts end RUN --rc 137 --job "$(scontrol show job -o $SLURM_JOB_ID)"

Exit codes of `begin`:
    0   the attempt is recorded
    3   the stage is finished: nothing to do
    2   an error that the user can fix

Exit codes of `end`, for the job:
    85  requeue
    0   the stage is finished
    2   an error that the user can fix
    1   any other end that should not be repeated
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from model.common.errors import UserError, command
from model.common.files import naming_full_disk, write_atomic
from model.common.records import parse_record, read_bounded
from pipeline.operations.first_error import find_first_error
from pipeline.runtime.attempt import Attempt, read_attempt
from pipeline.runtime.finished import is_finished
from pipeline.runtime.json_lines import append_line
from pipeline.runtime.stopping import EXIT_AGAIN, STOP_FILE, refuse_stop_file
from pipeline.stage.config import StageConfig, load_stage

log = logging.getLogger(__name__)

FINISHED = 3
MAX_CRASHES = 3
"""Stop the run after this many consecutive crashes at the same step."""
MAX_STOPS = 10
"""Stop after this many consecutive stops at the same step: the time limit is too short to start up."""
MAX_BAD_NODES = 5
"""Stop after this many consecutive attempts that failed the preflight."""
SMALL_DIT = 100_000_000
"""Maximum number of parameters of a DiT that can be trained without GPUs."""
MAX_BLOCK_SQUARES = 200
"""Upper bound of a block's parameters without its MLP in units of width^2: a small network needs no exact
count."""
TAIL_BYTES = 65536
"""Bytes at the end of `metrics.jsonl` that are searched for the last step and the last stop."""
ACTIVE_STATES = ("RUNNING", "COMPLETING", "SUSPENDED", "PENDING", "CONFIGURING", "REQUEUED")
"""States of a job that still works on its run, or will."""


@dataclass
class Ending:
    """The end of an attempt, and what follows; one line of `attempts.jsonl`."""

    job: str
    restart: int
    nodes: str
    started: float
    ended: float
    kind: str
    """One of these:

    - `finished`: the stage is finished
    - `stop`: saved, and to be continued
    - `crash`: a rank failed
    - `lost`: the node died
    - `outside`: requeued by a user or by Slurm
    - `bad_node`: failed the preflight
    - `cancelled`: canceled by a user
    - `user_error`: an error that the user can fix
    """
    reason: str
    step: int
    requeued: bool


def read_endings(run: Path) -> list[Ending]:
    """Return the endings of the attempts so far, oldest first; damaged lines are passed over."""
    path = run / "attempts.jsonl"
    endings: list[Ending] = []
    for number, line in enumerate(read_bounded(path).splitlines() if path.exists() else [], start=1):
        try:
            endings.append(parse_record(Ending, line))
        except ValueError as error:
            # cut short by a full disk or a power cut: it must not keep the run from ever starting again
            log.warning("%s: line %d is damaged and passed over: %s", path, number, error)

    return endings


def down_nodes(nodes: str) -> list[str]:
    """Return which of some nodes, such as `n[1-4]`, are down or do not answer, by Slurm's word."""
    if not nodes or shutil.which("sinfo") is None:
        return []
    arguments = ["sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    states = [line.split() for line in result.stdout.splitlines()]
    # a star behind the state: the node has not answered for some time
    return sorted({name for name, state in states if "down" in state or "fail" in state or "*" in state})


def _write_ending(run: Path, attempt: Attempt, kind: str, reason: str, step: int, requeued: bool) -> None:
    ending = Ending(
        attempt.job,
        attempt.restart,
        attempt.nodes,
        attempt.started,
        time.time(),
        kind,
        reason,
        step,
        requeued,
    )
    # appended and never rewritten, so that no ending can be lost
    append_line(run / "attempts.jsonl", asdict(ending))


def _read_tail(run: Path) -> str:
    """Return the end of a run's metrics, up to the last complete line."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return ""
    with metrics.open("rb") as file:
        # the end is enough, and the metrics of a long run are large
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    # a killed rank may have left an incomplete line
    return text[: text.rfind("\n") + 1]


def progress(run: Path) -> int:
    """Return the step that a run has reached: its last report, or its newest checkpoint if that is later."""
    manifests = (run / "checkpoints").glob("step_*/manifest.json")
    reached = [int(manifest.parent.name.split("_")[1]) for manifest in manifests]
    steps = re.findall(r'"step": ?(\d+)', _read_tail(run))
    # the report may be lost in a crash after the checkpoint was committed
    return max([*reached, *map(int, steps[-1:])], default=0)


def needs_gpu(stage: StageConfig) -> bool:
    """True if a stage's DiT is too large for CPUs."""
    # the number of latent channels hardly changes the size, so that of the settings will do
    dit = stage.dit(stage.model.channels)
    # three matrices of the MLP are the most that any MLP has
    if (MAX_BLOCK_SQUARES + 3 * dit.mlp_ratio) * dit.depth * dit.width**2 < SMALL_DIT:
        return False

    # imports torch, which takes seconds at each start of a job, and which `pipeline.status` does without
    from model.flops import count_parameters

    return count_parameters(dit, stage.fusion, [])["dit"] > SMALL_DIT


def queue_state(job: str, jobs: str) -> str:
    """Return the state of a job in Slurm's queue, such as RUNNING; empty if it is not in the queue.

    Args:
        job: its number.
        jobs: lines of `squeue -h -o '%A %T'`. The batch script asks Slurm, since a container has no squeue.
    """
    states = dict(line.split() for line in jobs.splitlines())
    return states.get(job, "")


def _seconds(text: str) -> float:
    """Return Slurm's `[days-]hours:minutes:seconds` in seconds; UNLIMITED is infinite."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        # Slurm writes UNLIMITED or Partition_Limit here
        return float("inf")
    days, _, clock = text.rpartition("-")
    total = 0
    for number in clock.split(":"):
        total = total * 60 + int(number)
    return total + 86400 * int(days or 0)


def cause_of_end(job: str, restart: int) -> Literal["itself", "outside", "time", "user"]:
    """Return the cause of a job's end.

    A job's state is COMPLETING once it was canceled, requeued or out of time. Only the other fields show
    which of these it was.

    Args:
        job: line of `scontrol show job -o`, taken while the batch script still runs.
        restart: number of times that the job was requeued before.
    """
    # the first `=` ends the name, since values such as TRES=cpu=8 have more of them
    fields = dict(re.findall(r"(\S+?)=(\S*)", job))
    if fields.get("JobState", "RUNNING") == "RUNNING":
        return "itself"
    if int(fields.get("Restarts", restart)) > restart:
        return "outside"
    return "time" if _seconds(fields.get("RunTime", "0")) >= _seconds(fields.get("TimeLimit", "")) else "user"


def begin(stage: StageConfig, attempt: Attempt, gpus: int, jobs: str = "") -> Path:
    """Record the start of an attempt, and return the run's folder.

    Args:
        stage: the stage to train.
        attempt: the attempt of this job.
        gpus: number of GPUs per node.
        jobs: Slurm's queue, as in `queue_state`.

    Raises:
        UserError: if the stage needs GPUs and the job has none, another job works on the run, or a file asks
            to stop.
    """
    run = stage.run
    # a forgotten --gpus-per-node would otherwise train for days on CPUs
    if not gpus and needs_gpu(stage):
        raise UserError(
            f"{stage.name} needs GPUs and the job has none: add --gpus-per-node=8 (or what the nodes have)"
        )
    refuse_stop_file(run)

    before = read_attempt(run)
    # two jobs at one run would overwrite each other's checkpoints
    if before is not None and before.job != attempt.job:
        state = queue_state(before.job, jobs)
        if state in ACTIVE_STATES:
            raise UserError(
                f"job {before.job} is already at {run} ({state}): "
                f"`scancel {before.job}` first, or give name=..."
            )

    # a job whose node died never called `end`
    recorded = {f"{ending.job}.{ending.restart}" for ending in read_endings(run)}
    if before is not None and before.name not in recorded:
        reason = (
            "the job ended without a record: its node died, its disk was full, or it was killed or requeued "
            "from outside"
        )
        if down := down_nodes(before.nodes):
            reason = f"the job ended without a record, and {', '.join(down)} is down"
        _write_ending(run, before, "lost", reason, progress(run), requeued=True)

    with naming_full_disk(run):
        _record_attempt(run, attempt)

    return run


def _record_attempt(run: Path, attempt: Attempt) -> None:
    """Write the attempt into the run's folder, and link the job's output there."""
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # logs are appended to, so older errors are in them too
    attempt.log_sizes = {path.name: path.stat().st_size for path in logs.glob("*.txt")}
    if attempt.output:
        # the job's output is stored elsewhere, and is easier to find from the run
        link = logs / f"job_{attempt.job}.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(attempt.output)
    # last: from here on, this attempt is the newest, and ranks of older ones write nothing
    write_atomic(run / "attempt.json", json.dumps(asdict(attempt)))


def _count_last(endings: list[Ending], kinds: set[str], step: int) -> int:
    """Return the number of last endings of these kinds at this step, not counting failed preflights."""
    count = 0
    for ending in reversed(endings):
        if ending.kind == "bad_node":
            continue
        if ending.kind not in kinds or ending.step != step:
            break
        count += 1
    return count


def judge(run: Path, rc: int, ended_by: str, why: str, bad_nodes: str) -> tuple[str, str, bool]:
    """Decide what the end of an attempt means.

    Args:
        run: the run's folder.
        rc: exit code; see `exit_code`.
        ended_by: cause of the job's end; see `cause_of_end`.
        why: what the batch script did to the ranks, or empty.
        bad_nodes: nodes that failed the preflight.

    Returns:
        Kind and reason of the ending, and True if the job should be requeued.
    """
    step, endings = progress(run), read_endings(run)
    saved = ", after saving a checkpoint" if rc == EXIT_AGAIN else ""
    if rc == 0 and not bad_nodes:
        return "finished", "the stage is finished", False
    # the requeued job is a new attempt that Slurm starts by itself
    if ended_by == "outside":
        return "outside", f"requeued from outside{saved}", False
    if ended_by == "user":
        return "cancelled", f"canceled{saved}", False

    if bad_nodes:
        # another start may get fit nodes, but not forever
        others = (i for i, ending in enumerate(reversed(endings)) if ending.kind != "bad_node")
        repeated = 1 + next(others, len(endings))
        return "bad_node", f"preflight failed on {bad_nodes}", repeated < MAX_BAD_NODES

    # the same command would fail the same way
    if rc == 2:
        return "user_error", "an error that you can fix, see the message", False

    if rc == EXIT_AGAIN:
        reason = _stop_reason(run)
        if (run / STOP_FILE).exists():
            return (
                "stop",
                f"the file {run / STOP_FILE} asked for it; remove it and submit again to continue",
                False,
            )
        repeated = 1 + _count_last(endings, {"stop"}, step)
        if repeated >= MAX_STOPS:
            question = "is the time limit too short to start up?"
            return "stop", f"{reason}: stopped {repeated} times at step {step}, {question}", False
        return "stop", reason, True

    if ended_by == "time":
        why = why or "out of time before all ranks had saved: give --signal a longer lead"
    reason = why or (f"killed by signal {rc - 128}" if rc > 128 else f"crashed with exit code {rc}")
    # progress resets the count: only crashes at the same step show a persistent error
    repeated = 1 + _count_last(endings, {"crash", "lost"}, step)
    if repeated >= MAX_CRASHES:
        return (
            "crash",
            f"{reason}; that is {repeated} times at step {step}, so it is not started again",
            False,
        )

    return "crash", reason, True


def _stop_reason(run: Path) -> str:
    """Return the trainer's reason to stop, from its last `stop` event."""
    reasons = re.findall(r'"event": "stop".*"reason": "([^"]*)"', _read_tail(run))
    return f"saved and exited after {reasons[-1]}" if reasons else "saved and exited"


def exit_code(run: Path, rc: int, attempt: Attempt) -> int:
    """Return the ranks' own exit code.

    srun reports the largest code, which is 137 if it killed the other ranks after the first one exited. A
    rank exits with 85 only after the checkpoint is committed on all ranks, so a single 85 counts for all. A
    rank that SIGUSR1 killed had not yet installed its handlers: it was asked to stop too.

    Args:
        run: the run's folder.
        rc: exit code of srun.
        attempt: the attempt that ended.
    """
    log = run / "logs" / "srun.txt"
    if not log.exists():
        return rc
    text = log.read_bytes()[attempt.log_sizes.get(log.name, 0) :].decode(errors="replace")
    # from this attempt on only: the file has the messages of earlier ones too
    codes = {int(code) for code in re.findall(r"tasks? [\d,-]+: Exited with exit code (\d+)", text)}
    if "User defined signal 1" in text or rc == 138:
        codes.add(EXIT_AGAIN)
    # a saved checkpoint counts more than a user's error, and both more than srun's own code
    return next((code for code in (EXIT_AGAIN, 2) if code in codes), rc)


def end(run: Path, rc: int, job: str, why: str, bad_nodes: str) -> int:
    """Record and print the end of an attempt; return the exit code for the job. Arguments as in `judge`."""
    attempt = read_attempt(run)
    if attempt is None:
        raise UserError(f"{run}: no attempt.json; call `begin` first")
    # ranks that the script killed, or that never started, have no code of their own
    rc = exit_code(run, rc, attempt) if not why and not bad_nodes else rc
    kind, reason, requeue = judge(run, rc, cause_of_end(job, attempt.restart), why, bad_nodes)
    step = progress(run)
    if kind in ("crash", "outside") and (down := down_nodes(attempt.nodes)):
        reason = f"{reason}; {', '.join(down)} is down"

    if kind in ("crash", "user_error"):
        error = find_first_error(run / "logs", attempt.log_sizes)
        print(
            f"== first error: {error}" if error else f"== no rank wrote an error; logs are in {run / 'logs'}"
        )
    next_action = "requeued" if requeue else "not requeued"
    print(f"== {run.name}: {reason} (step {step}, job {attempt.name}); {next_action}", flush=True)
    # last: a full disk must not hide why the job ended; requeued from outside counts as requeued too, so that
    # the status shows it as going on
    _write_ending(run, attempt, kind, reason, step, requeued=requeue or kind == "outside")

    return EXIT_AGAIN if requeue else {"finished": 0, "cancelled": 0, "user_error": 2}.get(kind, 1)


def from_environment() -> Attempt:
    """Return the attempt of this batch job."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID", "0")
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    return Attempt(job, restart, nodes, time.time(), environment.get("JOB_OUTPUT", ""))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.attempts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    opening = commands.add_parser("begin", help="record the start of an attempt; prints the run's folder")
    opening.add_argument("--jobs", default="", help="lines of `squeue -h -o '%%A %%T'`")
    opening.add_argument("stage")
    opening.add_argument("overrides", nargs="*", metavar="key=value")
    closing = commands.add_parser("end", help="record its end; the exit code is for the job")
    closing.add_argument("run", type=Path)
    closing.add_argument("--rc", type=int, default=0, help="exit code of srun")
    closing.add_argument("--job", default="", help="line of `scontrol show job -o`")
    closing.add_argument("--why", default="", help="what the batch script did to the ranks")
    closing.add_argument("--bad-nodes", default="", help="nodes that failed the preflight")

    return parser.parse_args()


@command
def main() -> None:
    """Run the command line."""
    arguments: Any = parse()
    if arguments.command == "end":
        sys.exit(end(arguments.run, arguments.rc, arguments.job, arguments.why, arguments.bad_nodes))
    stage = load_stage(arguments.stage, arguments.overrides)
    if is_finished(stage.run, stage.samples):
        print(
            f"{stage.name}: already finished, see {stage.run}; give name=... to train it again, or more "
            "samples=... to go on",
            file=sys.stderr,
        )
        sys.exit(FINISHED)
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    print(begin(stage, from_environment(), gpus, arguments.jobs))


if __name__ == "__main__":
    main()
