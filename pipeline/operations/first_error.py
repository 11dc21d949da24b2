"""Finding the first error in the logs of many ranks, where most errors are consequences of another rank's."""

import re
from pathlib import Path
from typing import NamedTuple

CONSEQUENCES = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|DistBackendError|gloo/transport"
    r"|remote process exited|NCCL (error|WARN|timeout)|TCPStore|Socket Timeout|terminate called|Watchdog"
)
"""Messages of a rank whose peer has failed."""
STARTS = re.compile(
    r"^(Traceback \(most recent call last\):|error: |\w*(?:Error|Exception)\b.*:|Fatal Python error"
    r"|.*\bout of memory\b)"
)
LAST_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Iteration)\b")
KILLED = re.compile(r"srun: error: (\S+: tasks? [\d,-]+: (?!Exited).*)")
"""srun's line about a task that a signal killed."""
MAX_LINES = 30
"""Maximum number of lines of an error that are shown."""

OWN, SILENT, CONSEQUENCE = 0, 1, 2
"""Kinds of errors, most informative first: a rank's own error, a death without a message, a consequence."""


class Failure(NamedTuple):
    """An error in a log. The smallest one is the cause."""

    kind: int
    time: float
    """Time of the last write to the log: a rank that failed writes no more."""
    log: str
    text: str


def _errors(text: str) -> list[list[str]]:
    """Return blocks of lines that report an error: a traceback down to its last line, or a single line."""
    blocks: list[list[str]] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("Traceback "):
            # frames are indented, so the first line of a name at the margin is the exception
            ends = (i for i in range(number + 1, len(lines)) if LAST_LINE.match(lines[i]))
            end = next(ends, min(number + MAX_LINES, len(lines) - 1))
            blocks.append(lines[number : end + 1])
            # the search goes on after the block, so that its last line does not count twice
            number = end
        elif STARTS.match(lines[number]):
            blocks.append([lines[number]])
        number += 1

    return blocks


def find_first_error(logs: Path, sizes: dict[str, int]) -> str:
    """Find the first error of any rank.

    A rank's own error comes before a death without a message, and that before a consequence of a peer's
    death. Of several errors of a kind, the one in the log that was last written first counts.

    Args:
        logs: folder of the logs.
        sizes: size of each log when the attempt started; earlier bytes are ignored.

    Returns:
        The log's name and the error's lines, or an empty string.
    """
    failures: list[Failure] = []
    for path in sorted(logs.glob("*.txt")):
        # the job's own output repeats rank 0's log
        if path.is_symlink():
            continue
        # errors of earlier attempts come before this size
        text = path.read_bytes()[sizes.get(path.name, 0) :].decode(errors="replace")
        written = path.stat().st_mtime

        # a rank's later errors follow from its first one
        for block in _errors(text)[:1]:
            # the last line names the exception; frames mention timeouts of all kinds
            kind = CONSEQUENCE if CONSEQUENCES.search(block[-1]) else OWN
            # the first line and the innermost frames say most
            shown = block if len(block) <= MAX_LINES else [block[0], "  ...", *block[2 - MAX_LINES :]]
            failures.append(Failure(kind, written, path.name, "\n".join(shown)))
        if path.name == "srun.txt" and (killed := KILLED.search(text)):
            failures.append(Failure(SILENT, written, path.name, killed[1]))

    if not failures:
        return ""
    # tuples compare by kind first, and then by time
    first = min(failures)

    return f"{first.log.removesuffix('.txt')}: {first.text}"
