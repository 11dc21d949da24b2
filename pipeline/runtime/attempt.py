"""The newest start of a run by a cluster job, and whether this process still belongs to it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from model.common.errors import UserError


@dataclass
class Attempt:
    """One start of a run by a job."""

    job: str
    restart: int
    nodes: str
    started: float
    output: str = ""
    """The job's output file."""
    log_sizes: dict[str, int] = field(default_factory=dict)
    """Size of each log when the attempt began, so that its own lines can be told from older ones."""

    @property
    def name(self) -> str:
        """`job.restart`."""
        return f"{self.job}.{self.restart}"


def read_attempt(run: Path) -> Attempt | None:
    """The newest attempt at a run, or None."""
    path = run / "attempt.json"
    return Attempt(**json.loads(path.read_text())) if path.exists() else None


def check_still_ours(run: Path) -> None:
    """Look whether the attempt that this process belongs to, which cluster/train.sh exports, is still the newest one.

    A rank cut off from Slurm may outlive its job, and must not write into a run that another job has since taken over.

    Raises:
        UserError: another attempt has begun.
    """
    ours, newest = os.environ.get("LI_DIT_ATTEMPT", ""), read_attempt(run)
    if ours and newest is not None and newest.name != ours:
        raise UserError(
            f"{run}: job {newest.name} has taken this run over from {ours}: let it go on, this process writes nothing"
        )
