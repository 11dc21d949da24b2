"""What a person sees while a run is going: a progress bar on a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSOLE = Console(file=sys.stdout, soft_wrap=True, highlight=False)


def log_line(message: str) -> None:
    """One line, stamped with the time of day."""
    CONSOLE.print(
        f"[dim]{time.strftime('%H:%M:%S')}[/dim] {message}" if CONSOLE.is_terminal else f"{time.strftime('%H:%M:%S')} {message}"
    )


class TrainingProgress:
    """Progress of a stage in samples: a bar on a terminal; elsewhere a line per report."""

    def __init__(self, name: str, done: int, total: int, shows: bool) -> None:
        self.shows = shows
        self.bar: Progress | None = None
        if shows and CONSOLE.is_terminal:
            self.bar = Progress(
                TextColumn(name), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} samples"),
                TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=CONSOLE,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(name, total=total, completed=done, numbers="")

    def advance(self, samples: int) -> None:
        """`samples` are done in all."""
        if self.bar is not None:
            self.bar.update(self.task, completed=samples)

    def report(self, step: int, samples: int, values: dict[str, float]) -> None:
        """Show an interval's numbers."""
        shown = {
            "loss": "{:.4f}",
            "grad_norm": "{:.3f}",
            "samples_per_second": "{:.1f}/s",
            "mfu": "mfu {:.1%}",
            "goodput": "goodput {:.1%}",
        }
        numbers = "  ".join(
            form.format(values[key]) if " " in form or "/s" in form else f"{key} {form.format(values[key])}"
            for key, form in shown.items()
            if key in values
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=samples, numbers=numbers)
        elif self.shows:
            log_line(f"step {step}  samples {samples:,}  {numbers}")

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.stop()
