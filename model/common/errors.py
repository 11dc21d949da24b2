"""The one error that a user sees, and the one way a command ends with it."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: the message names the thing and the way out, on one line."""


def print_error(error: UserError) -> None:
    """Print a `UserError` as the user sees it: one line on stderr."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or its class name if it is empty."""
    # Messages of transformers and the hub client have many lines; a `UserError` has one.
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's `main` so that a `UserError` prints one line on stderr and exits with code 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print_error(error)
            sys.exit(2)

    return wrapped
