"""Reasons to stop a run before its end: a signal, a file, a time limit.

Signal handlers only set a flag. The ranks agree on it at the next step boundary, save, and exit with
`EXIT_AGAIN`.
"""

import signal
import time
from pathlib import Path
from types import FrameType

from model.common.errors import UserError

EXIT_AGAIN = 85
"""Exit code of a run that committed a checkpoint and is to be started again."""
STOP_FILE = "stop"
"""Name of the file in a run's folder that asks the run to save and to end."""


def refuse_stop_file(run: Path) -> None:
    """Check before a start that no file is left that would end it at once.

    Raises:
        UserError: if there is one.
    """
    if (run / STOP_FILE).exists():
        raise UserError(f"{run / STOP_FILE} asks this run to stop: remove the file to continue")


class Stop:
    """Collects this rank's reasons to stop."""

    def __init__(self) -> None:
        self.reason = ""
        self._deadline = float("inf")
        self._file: Path | None = None

    def install(self) -> "Stop":
        """Catch SIGUSR1 and SIGTERM.

        Call it before torch is imported: a signal in those seconds must not kill the rank.
        """
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # nothing else: the signal may interrupt any line, even an allocation
        self.reason = signal.Signals(number).name

    def watch(self, file: Path, minutes: float | None) -> None:
        """Also stop when `file` exists, or `minutes` from now."""
        self._file = file
        # not the time of day, which an NTP correction may move
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")

    def requested(self) -> bool:
        """True if this rank has a reason to stop; `reason` then names it."""
        # the first reason stays, so that the log names the one that stopped the run
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "time limit"
        if not self.reason and self._file is not None and self._file.exists():
            self.reason = f"{self._file.name} file"
        return bool(self.reason)
