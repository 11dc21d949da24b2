"""What can go wrong with storage: the errors, and how long an operation is tried again."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tenacity

from model.common.errors import UserError

log = logging.getLogger(__name__)

DAMAGED_TRIES = 5
"""Reads of one object that may fail its hash before it counts as damaged where it lies, not on the way."""


class StoreError(UserError):
    """A store did not do what was asked, in spite of all retries; the message names the object."""


class TransientError(Exception):
    """A fault that may pass: worth another try."""


class DamagedError(TransientError):
    """A body that does not match its size or hash."""


def retry_seconds() -> float:
    """How long an operation is tried again before it fails; `LI_DIT_RETRY_SECONDS` shortens the ten minutes."""
    return float(os.environ.get("LI_DIT_RETRY_SECONDS", 600))


def retrying(what: str) -> tenacity.Retrying:
    """Policy for one operation on the object named by `what`: exponential waits with full jitter, up to 30 s each.

    Use it as `retrying(uri)(function, *arguments)`. Only `TransientError` is tried again. Time counts from the first fault, so
    that what takes long by itself is tried again too.

    Raises:
        StoreError: the time is up, or the body was damaged `DAMAGED_TRIES` times.
    """
    budget = retry_seconds()
    damaged, first = 0, None

    def stop(state: tenacity.RetryCallState) -> bool:
        nonlocal damaged, first
        damaged += isinstance(_error(state), DamagedError)
        seconds = state.seconds_since_start or 0
        first = seconds if first is None else first
        return damaged >= DAMAGED_TRIES or seconds - first >= budget

    def give_up(state: tenacity.RetryCallState) -> None:
        error = _error(state)
        raise StoreError(
            f"{what}: {error} ({state.attempt_number} tries in {state.seconds_since_start or 0:.0f} s): "
            + ("the object is damaged; `verify` says what to do" if damaged >= DAMAGED_TRIES else "check the store, run again")
        ) from error

    def report(state: tenacity.RetryCallState) -> None:
        wait = state.next_action.sleep if state.next_action else 0
        log.warning("%s: %s; try %d, next in %.1f s", what, _error(state), state.attempt_number, wait)

    return tenacity.Retrying(
        wait=tenacity.wait_random_exponential(multiplier=min(1.0, budget / 40), max=min(30.0, budget / 8)),
        stop=stop,
        retry=tenacity.retry_if_exception_type(TransientError),
        retry_error_callback=give_up,
        before_sleep=report,
    )


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error that names `path`.

    Raises:
        UserError: the disk, the quota or the permitted file size is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: {os.strerror(error.errno)}: free space there, or use another disk, and run again"
            ) from error
        raise
