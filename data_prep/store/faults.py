"""Storage faults: their exceptions, and how long an operation is retried."""

import logging
import os

import tenacity

from model.common.errors import UserError

log = logging.getLogger(__name__)

MAX_DAMAGED_READS = 5
"""Reads of one object that may fail its hash before the object itself, not the network, counts as damaged."""


class StoreError(UserError):
    """A store operation failed in spite of all retries; the message names the object."""


class TooLargeError(Exception):
    """An object that is larger than its reader takes."""


class TransientError(Exception):
    """A fault that may pass, so the operation is worth another try."""

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        """Make the error.

        Args:
            message: what went wrong.
            wait_seconds: how long the other side asks to wait before the next try.
        """
        super().__init__(message)
        self.wait_seconds = wait_seconds


class DamagedError(TransientError):
    """A body that does not match its size or hash."""


def retry_seconds() -> float:
    """Return how long an operation is retried before it fails: ten minutes, or `LI_DIT_RETRY_SECONDS`."""
    return float(os.environ.get("LI_DIT_RETRY_SECONDS", 600))


def retrying(what: str) -> tenacity.Retrying:
    """Build the retry policy for one operation: exponential waits with full jitter, up to 30 s each.

    A wait that the other side asks for is kept, up to a tenth of the budget.

    Use it as `retrying(uri)(function, *arguments)`. Only `TransientError` is retried. Time counts from the
    first fault, so an operation that takes long by itself is retried too.

    Args:
        what: the object, as messages name it.

    Returns:
        A callable that runs a function under the policy.

    Raises:
        StoreError: from the call, if the time is up or the body was damaged `MAX_DAMAGED_READS` times.
    """
    budget = retry_seconds()
    damaged_reads = 0
    first_fault: float | None = None

    # tenacity's own `stop_after_delay` counts from the start of the call, which would leave a long upload no
    # second try.
    def stop(state: tenacity.RetryCallState) -> bool:
        nonlocal damaged_reads, first_fault
        seconds = state.seconds_since_start or 0
        if first_fault is None:
            first_fault = seconds
        if isinstance(_error(state), DamagedError):
            damaged_reads += 1
        return damaged_reads >= MAX_DAMAGED_READS or seconds - first_fault >= budget

    def give_up(state: tenacity.RetryCallState) -> None:
        error = _error(state)
        tries = f"{state.attempt_number} tries in {state.seconds_since_start or 0:.0f} s"
        damaged = damaged_reads >= MAX_DAMAGED_READS
        advice = (
            "the object is damaged; `verify` says what to do" if damaged else "check the store, run again"
        )
        raise StoreError(f"{what}: {error} ({tries}): {advice}") from error

    def report(state: tenacity.RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0
        log.warning("%s: %s; try %d, next in %.1f s", what, _error(state), state.attempt_number, seconds)

    # A short budget (tests set seconds) shortens the waits too, so that several tries fit into it.
    backoff = tenacity.wait_random_exponential(multiplier=min(1.0, budget / 40), max=min(30.0, budget / 8))

    def wait(state: tenacity.RetryCallState) -> float:
        asked = getattr(_error(state), "wait_seconds", 0.0)
        return max(backoff(state), min(asked, budget / 10))

    return tenacity.Retrying(
        wait=wait,
        stop=stop,
        retry=tenacity.retry_if_exception_type(TransientError),
        # Called instead of raising tenacity's `RetryError`, which does not name the object.
        retry_error_callback=give_up,
        before_sleep=report,
    )


def _error(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
