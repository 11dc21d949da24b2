"""The users that were deleted from a run: `forgotten.json` in its folder.

A run reads one snapshot to its end, which goes on saying whose an image is. The images of these users are
nobody's in it, so that their rows, which are zero, are not trained again.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict  # the standard library's has no checks before Python 3.12

from model.common.files import write_atomic
from model.common.records import STRICT, Count, read_record, seal

RECORD = "forgotten.json"


class ForgottenRecord(TypedDict):
    """`forgotten.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    format: Literal[1]
    users: list[Count]


def read_forgotten(run: Path) -> frozenset[int]:
    """Return the numbers of the users that were deleted from a run.

    Raises:
        UserError: if the record is damaged.
    """
    try:
        record = read_record(run / RECORD, ForgottenRecord, "write the numbers of the deleted users again")
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    return frozenset(record["users"])


def add_forgotten(run: Path, users: Iterable[int]) -> None:
    """Record users as deleted from a run, besides those that are.

    Raises:
        UserError: if the record that is there is damaged.
    """
    known = read_forgotten(run) | set(users)
    write_atomic(run / RECORD, seal({"format": 1, "users": sorted(known)}), durable=True)


def forgotten_at_start(start_from: str) -> frozenset[int]:
    """Return the users that were deleted from the run that a stage starts from: a run, or one of its
    checkpoints.

    Raises:
        UserError: if the record is damaged.
    """
    if not start_from:
        return frozenset()
    path = Path(start_from)
    return read_forgotten(path.parent.parent if path.parent.name == "checkpoints" else path)


def forgotten_users(run: Path, start_from: str) -> frozenset[int]:
    """Return the users whose images are nobody's in a run: all that were deleted before its first step, or
    from itself since.

    Raises:
        UserError: if a record is damaged.
    """
    # Once started, the run has a record of its own: what it started from may since be another run.
    return read_forgotten(run) if (run / RECORD).exists() else forgotten_at_start(start_from)
