"""The progress display of every job: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0
"""Time between two lines in a log."""


class Progress:
    """Count finished work, and show the rate, the time left and the counts by outcome.

    Use it as a context manager and call `advance` after every piece of work.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "rows",
        *,
        done: int = 0,
        console: Console | None = None,
        shows: bool = True,
        lines: bool = True,
    ) -> None:
        """Set up the display.

        Args:
            title: name of the job.
            total: units to do in all; None = unknown.
            unit: what is counted, in the plural.
            done: units that were done before.
            console: where to show it; None = standard error.
            shows: False = show nothing, for all processes but one.
            lines: False = show nothing where there is no terminal.
        """
        self.title = title
        self.total = total
        self.unit = unit
        self.done = done
        self.outcomes: Counter[str] = Counter()
        self._start = self._last_line = time.monotonic()
        # A bar in a file would be a line per update, so a log gets a line every `LINE_SECONDS`.
        console = console or Console(stderr=True)
        self.bar = _start_bar(console) if shows and console.is_terminal else None
        self._prints_lines = shows and lines and self.bar is None
        if self.bar:
            self._task = self.bar.add_task(
                title, total=total, completed=done, count=self._count(), note="", outcomes=""
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the last line would look like a success.
        if self._prints_lines and kind is None:
            self._print_line()
        self.close()

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar:
            self.bar.stop()

    def advance(self, n: int = 1, outcome: str = "") -> None:
        """Count `n` units as done, under `outcome` if it is given."""
        if outcome and n:
            self.outcomes[outcome] += n
        self.update(self.done + n)

    def update(self, done: int) -> None:
        """Set the units that are done in all."""
        self.done = done
        if self.bar:
            self.bar.update(
                self._task,
                completed=done,
                count=self._count(),
                note=self.note(),
                outcomes=self._list_outcomes(),
            )
        elif self._prints_lines and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def note(self) -> str:
        """Return the text after the count: the rate."""
        # The lower bound keeps a first update at the very start from dividing by zero.
        return f"{self.done / max(time.monotonic() - self._start, 1e-3):,.1f} {self.unit}/s"

    def _count(self) -> str:
        of = f"/{self.total:,}" if self.total is not None else ""
        return f"{self.done:,}{of} {self.unit}"

    def _list_outcomes(self) -> str:
        return ", ".join(f"{outcome} {count:,}" for outcome, count in self.outcomes.most_common(6))

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        line = f"{self.title}: {self._count()}, {self.note()}, {elapsed:,.0f} s"
        if self.total and 0 < self.done < self.total:
            line += f", {elapsed / self.done * (self.total - self.done):,.0f} s left"
        if self.outcomes:
            line += f" | {self._list_outcomes()}"
        print(line, file=sys.stderr, flush=True)


def _start_bar(console: Console) -> Bar:
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[outcomes]}"),
        console=console,
    )
    bar.start()
    return bar
