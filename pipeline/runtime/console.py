"""Output of a running command: a progress bar on a terminal, plain lines in a log."""

import sys
import time

from rich.console import Console

from model.common.progress import Progress

# soft_wrap, since rich would break long lines of a log at 80 columns
CONSOLE = Console(file=sys.stdout, soft_wrap=True, highlight=False)
_NUMBERS = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3f}",
    "samples_per_second": "{:.1f}/s",
    "mfu": "mfu {:.1%}",
    "goodput": "goodput {:.1%}",
}
"""Metrics of a report that are shown, with their formats."""


def log_line(message: str) -> None:
    """Print a line with the time of day."""
    now = time.strftime("%H:%M:%S")
    CONSOLE.print(f"[dim]{now}[/dim] {message}" if CONSOLE.is_terminal else f"{now} {message}")


class TrainingProgress(Progress):
    """Progress of a stage in samples: a bar on a terminal; elsewhere one line per report."""

    def __init__(self, name: str, done: int, total: int, shows: bool) -> None:
        self._numbers = ""
        self._shows = shows
        super().__init__(name, total, "samples", done=done, console=CONSOLE, shows=shows, lines=False)

    def note(self) -> str:
        """Return the numbers of the last report."""
        return self._numbers

    def report(self, step: int, samples: int, values: dict[str, float]) -> None:
        """Show the numbers of an interval that ends at `step`, after `samples` samples."""
        # not every report has all of them: MFU needs a known GPU, for example
        self._numbers = "  ".join(form.format(values[key]) for key, form in _NUMBERS.items() if key in values)
        self.update(samples)
        if self._shows and not self.bar:
            log_line(f"step {step}  samples {samples:,}  {self._numbers}")
