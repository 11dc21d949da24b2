"""The newest attempt at a run by a cluster job, and a check that this process still belongs to it."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from model.common.errors import UserError
from model.common.records import read_record

log = logging.getLogger(__name__)

OWN_ATTEMPT = "LI_DIT_ATTEMPT"
"""The variable in which cluster/train.sh gives the ranks the name of their attempt."""


@dataclass
class Attempt:
    """One start of a run by a job."""

    job: str
    restart: int
    nodes: str
    started: float
    """Seconds since 1970."""
    output: str = ""
    """Path of the job's output file."""
    log_sizes: dict[str, int] = field(default_factory=dict)
    """Size of each log at the start of the attempt: later bytes are the attempt's own."""

    @property
    def name(self) -> str:
        """`job.restart`."""
        return f"{self.job}.{self.restart}"


def read_attempt(run: Path) -> Attempt | None:
    """Return the newest attempt at a run; None if there is none, or its record is damaged."""
    # `begin` replaces the file as a whole, so a reader never sees a part of it
    path = run / "attempt.json"
    try:
        return read_record(path, Attempt, "it is passed over")
    except FileNotFoundError:
        return None
    except UserError as error:
        # a power cut may leave an empty file; the record only says who was there before
        log.warning("%s", error)
        return None


def check_newest_attempt(run: Path) -> None:
    """Check that this process's attempt, which cluster/train.sh exports, is still the newest one.

    A rank that lost its connection to Slurm may outlive its job. It must not write into a run that another
    job has since taken over.

    Raises:
        UserError: if there is a newer attempt.
    """
    # without the variable, the run was started by hand, and there is no attempt to compare
    own, newest = os.environ.get(OWN_ATTEMPT, ""), read_attempt(run)
    if own and newest is not None and newest.name != own:
        raise UserError(
            f"{run}: job {newest.name} has taken this run over from {own}: let it continue, "
            "this process writes nothing"
        )
