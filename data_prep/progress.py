"""One progress display for every job: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0


class Progress:
    """Counts work done and shows rate, time left and the counts by outcome, on standard error.

    Use it as a context manager; `advance(n, outcome="written")` after every piece of work.
    """

    def __init__(self, title: str, total: int | None, unit: str = "rows") -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.outcomes: Counter[str] = Counter()
        self._start = self._last_line = time.monotonic()
        self._bar = _make_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(title, total=total, rate="", outcomes="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, n: int = 1, outcome: str = "") -> None:
        """Count `n` units as done, under `outcome` if it is given."""
        self.done += n
        if outcome and n:
            self.outcomes[outcome] += n
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=self._rate(), outcomes=self._counts())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def _rate(self) -> str:
        return f"{self.done / max(time.monotonic() - self._start, 1e-3):,.1f} {self.unit}/s"

    def _counts(self) -> str:
        return ", ".join(f"{outcome} {count:,}" for outcome, count in self.outcomes.most_common(6))

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        of = f"/{self.total:,}" if self.total is not None else ""
        left = (
            f", {elapsed / self.done * (self.total - self.done):,.0f} s left" if self.total and 0 < self.done < self.total else ""
        )
        counts = f" | {self._counts()}" if self.outcomes else ""
        print(
            f"{self.title}: {self.done:,}{of} {self.unit}, {self._rate()}, {elapsed:,.0f} s{left}{counts}",
            file=sys.stderr,
            flush=True,
        )


def _make_bar() -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[outcomes]}"),
        console=Console(stderr=True),
    )
