"""Finding the error that came first in the logs of many ranks, where most errors are echoes of another rank's."""

import re
from pathlib import Path

ECHOES = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out|DistBackendError|gloo/transport|remote process exited"
    r"|NCCL (error|WARN|timeout)|TCPStore|Socket Timeout|terminate called|Watchdog"
)
"""What a rank says when a peer has gone."""
STARTS = re.compile(
    r"^(Traceback \(most recent call last\):|error: |\w*(?:Error|Exception)\b.*:|Fatal Python error|.*\bout of memory\b)"
)
LAST_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Iteration)\b")
MAX_LINES = 30


def _errors(text: str) -> list[list[str]]:
    """Blocks of lines that tell an error: a traceback down to its last line, or a single line."""
    blocks: list[list[str]] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("Traceback "):
            stop = next(
                (i for i in range(number + 1, len(lines)) if LAST_LINE.match(lines[i])), min(number + MAX_LINES, len(lines) - 1)
            )
            blocks.append(lines[number : stop + 1])
            number = stop
        elif STARTS.match(lines[number]):
            blocks.append([lines[number]])
        number += 1
    return blocks


def find_first_error(logs: Path, sizes: dict[str, int]) -> str:
    """The first error of any rank since the logs had `sizes`: its log and lines, or an empty string.

    An error of its own goes before a death without a word, and that before an echo of a peer's death; among several, the
    one in the log that was written to first, since a rank that failed writes no more.
    """
    found: list[tuple[int, float, str, str]] = []  # rank of the kind, time, log, lines
    for path in sorted(logs.glob("*.txt")):
        if path.is_symlink():
            continue
        text = path.read_bytes()[sizes.get(path.name, 0) :].decode(errors="replace")
        for block in _errors(text)[:1]:
            shown = block if len(block) <= MAX_LINES else [block[0], "  ...", *block[2 - MAX_LINES :]]
            found.append((2 if ECHOES.search(block[-1]) else 0, path.stat().st_mtime, path.name, "\n".join(shown)))
        if path.name == "srun.txt" and (died := re.search(r"srun: error: (\S+: tasks? [\d,-]+: (?!Exited).*)", text)):
            found.append((1, path.stat().st_mtime, path.name, died[1]))
    if not found:
        return ""
    _, _, name, text = min(found)
    return f"{name.removesuffix('.txt')}: {text}"
