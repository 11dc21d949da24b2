"""Times, deadlines and lines of results of the phases of `benchmarks.gpu_probe`."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.common.errors import first_line

OURS = ("benchmarks", "data_prep", "model", "pipeline")
T = TypeVar("T")


class OutOfTime(Exception):
    """The deadline of a phase is over."""


def describe(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def missing_package(error: BaseException) -> str | None:
    """Return the package that an import lacks, or None if the error is another one."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    # A module of ours that is missing is a mistake and no property of the machine.
    return None if package in OURS else package


def write_line(out: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON to the results, and print it: it has to survive the end of the process."""
    text = json.dumps(line)
    with (out / "results.jsonl").open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


class Probe:
    """A phase's device, deadline and results.

    Attributes:
        device: the GPU, or the CPU if there is none.
        dtype: bf16 on a GPU, where training computes in it, and fp32 on a CPU.
        failures: number of errors so far.
    """

    def __init__(self, phase: str, out: Path, seconds: float, tiny: bool) -> None:
        """Start the clock.

        Args:
            phase: name of the phase.
            out: folder of the results.
            seconds: time from now until the deadline.
            tiny: True for sizes that a CPU measures in seconds.
        """
        self.phase, self.out, self.tiny, self.failures = phase, out, tiny, 0
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.dtype = torch.bfloat16 if self.gpu else torch.float32

    # -- sizes and tensors --

    def pick(self, full: T, tiny: T) -> T:
        """Return the value for a whole measurement, or for a tiny one."""
        return tiny if self.tiny else full

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        """Return normal numbers on the device, in the phase's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(grad)

    # -- results --

    def result(self, what: str, value: float, unit: str, **details: Any) -> None:
        """Record a measured value; with `at_least` or `at_most` among the details it is a goal."""
        for name, detail in details.items():
            if isinstance(detail, float):
                details[name] = float(f"{detail:.5g}")
        self._line({"what": what, "value": float(f"{value:.5g}"), "unit": unit, **details})

    def reason(self, what: str, why: str) -> None:
        """Record why something is not measured, which is no failure."""
        self._line({"what": what, "skipped": why})

    def failed(self, what: str, error: BaseException) -> None:
        """Record an error, after which the phase counts as failed."""
        self.failures += 1
        self._line({"what": what, "error": describe(error)})

    def _line(self, line: dict[str, Any]) -> None:
        write_line(self.out, {"phase": self.phase, **line})

    def check(self) -> None:
        """Check the deadline; call it between measurements.

        Raises:
            OutOfTime: if the deadline is over.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"the {self.seconds:.0f} s of this phase are over")

    @contextmanager
    def part(self, what: str, optional: bool = False) -> Iterator[None]:
        """Return a context for some measurements, whose errors are recorded and do not end the phase.

        Args:
            what: name of the measurements.
            optional: True if a machine may lack what they need: a `RuntimeError` is then a reason and no
                failure.

        Raises:
            OutOfTime: if the deadline is over.
        """
        self.check()
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            package = missing_package(error)
            if package:
                self.reason(what, f"the package {package} is not installed")
            elif optional and isinstance(error, RuntimeError):
                self.reason(what, describe(error))
            else:
                self.failed(what, error)

        if self.gpu:
            torch.cuda.empty_cache()

    # -- times --

    def mark(self) -> Any:
        """Return a point in time: an event in the queue of the GPU, or the CPU's clock."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two marks, waiting for the GPU to reach the second."""
        if not self.gpu:
            return 1e3 * (stop - start)
        stop.synchronize()
        return start.elapsed_time(stop)

    def milliseconds(self, work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
        """Return the median time of a call.

        Raises:
            OutOfTime: if the deadline is over before it begins.
        """
        self.check()
        repeats, warmup = self.pick(repeats, 2), self.pick(warmup, 1)
        for _ in range(warmup):
            work()

        # All calls are queued before the first wait, so that the host's launches are behind the GPU's work.
        marks = []
        for _ in range(repeats):
            start = self.mark()
            work()
            marks.append((start, self.mark()))
        return statistics.median(self.between(*pair) for pair in marks)

    def once(self, work: Callable[[], object]) -> float:
        """Return the seconds of a single call by the host's clock, until the device is done.

        Raises:
            OutOfTime: if the deadline is over before it begins.
        """
        self.check()
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.gpu:
            torch.cuda.synchronize()

    # -- memory --

    def memory(self) -> float:
        """Return the GiB that tensors take now; 0 without a GPU."""
        return torch.cuda.memory_allocated() / 2**30 if self.gpu else 0.0

    def peak_memory(self, work: Callable[[], object]) -> float:
        """Return the most GiB that tensors take during a call; 0 without a GPU."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
