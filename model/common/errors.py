"""The one error that a user sees, and the one way a command ends with it."""

import errno
import functools
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: the message names the thing and the way out, on one line."""

    def __str__(self) -> str:
        # Names in the message may come from damaged files.
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Return a text on one line, with control characters escaped, which a terminal would obey."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in " ".join(text.split())
    )


def print_error(error: UserError) -> None:
    """Print a `UserError` as the user sees it: one line on stderr."""
    print(f"error: {error}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or its class name if it is empty."""
    # Messages of transformers and the hub client have many lines; a `UserError` has one.
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def explain(error: BaseException) -> BaseException:
    """Return a `UserError` for a limit of the machine that libraries report in many ways; else the error."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, UserError):
        return error
    # PyTorch has the system's message in its own errors only as text.
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
        return UserError(f"too many open files ({text}): raise the limit, see `ulimit -n`")
    if re.search(
        r"shared memory object|allocate shared memory|out of shared memory|/dev/shm|/torch_\d", str(error)
    ) or (isinstance(error, OSError) and error.errno == errno.EROFS and error.filename is None):
        return UserError(
            f"/dev/shm is too small or cannot be written ({text}): give it more (containers: --shm-size), or "
            "set data.workers=0"
        )
    return error


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's `main` so that a `UserError` prints one line on stderr and exits with code 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print_error(error)
            sys.exit(2)
        except (OSError, RuntimeError) as error:
            explained = explain(error)
            if not isinstance(explained, UserError):
                raise
            print_error(explained)
            sys.exit(2)

    return wrapped
