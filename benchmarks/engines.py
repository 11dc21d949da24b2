"""Engines of data preparation: overhead of a unit on Ray, idle workers where one is slow, loads of models.

    python -m benchmarks.engines [--workers 16] [--units 40] [--seconds 0.25] [--tiny]

Units sleep, so many workers fit on few cores: what is measured is who waits for whom. A real local Ray
cluster does them, and for comparison the tasks of an array do the same units in fixed shares. One worker
takes twice as long for each unit. The idle share is the share of all workers' time, from the first unit's
start to the last one's end, in which they do none. It needs the extra `ray`.
"""

import argparse
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray  # pyright: ignore[reportMissingImports]

from benchmarks.reporting import at_most, conditions, print_goals
from data_prep.engines import Do, Outcome, Ray, Step, connected, run
from model.common.share import Share

MAX_OVERHEAD_MS = 10.0
MAX_IDLE = 0.05
EMPTY_UNITS = (100, 600)
"""Units without work, whose difference in time is that of their overhead."""
START_SECONDS = 300


class EmptyStep(Step):
    """Units that do nothing."""

    title = "empty units"

    def __init__(self, count: int) -> None:
        self.units = [str(number) for number in range(count)]

    def missing(self) -> None:
        """Nothing is stored."""

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Open nothing."""
        yield lambda units: (Outcome() for _ in units)


class SleepingStep(Step):
    """Units that sleep, on workers of which one is slow, and that record when."""

    title = "sleeping units"

    def __init__(self, folder: Path, count: int, workers: int, seconds: float) -> None:
        """Sleep not yet.

        Args:
            folder: an empty folder for records.
            count: number of units.
            workers: number of workers, which all begin at once.
            seconds: duration of a unit on a worker that is not slow.
        """
        self.units = [f"{number:06d}" for number in range(count)]
        self._folder, self._workers, self._seconds = folder, workers, seconds

    def missing(self) -> list[str]:
        """Return the units without a record."""
        return [unit for unit in self.units if not (self._folder / unit).exists()]

    @contextmanager
    def setup(self) -> Iterator[Do]:
        """Load a model, in name, and wait for the other workers, whose start is not measured."""
        worker = uuid.uuid4().hex
        (self._folder / f"load-{worker}").touch()
        try:
            (self._folder / "slow").touch(exist_ok=False)
            slow = 2
        except FileExistsError:
            slow = 1
        end = time.monotonic() + START_SECONDS
        while loads(self._folder) < self._workers and time.monotonic() < end:
            time.sleep(0.05)

        def do(units: Sequence[str]) -> Iterator[Outcome]:
            for unit in units:
                start = time.time()
                time.sleep(self._seconds * slow)
                (self._folder / unit).write_text(json.dumps([start, time.time()]))
                yield Outcome()

        yield do


def loads(folder: Path) -> int:
    """Return how many workers have loaded a model."""
    return sum(path.name.startswith("load-") for path in folder.iterdir())


def idle_share(step: SleepingStep, folder: Path, workers: int) -> tuple[float, float]:
    """Return the share of the workers' time in which they did no unit, and the seconds of all."""
    spans = [json.loads((folder / unit).read_text()) for unit in step.units]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    busy = sum(end - start for start, end in spans)
    return 1 - busy / (workers * seconds), seconds


def on_array(step: SleepingStep, workers: int) -> None:
    """Do the units in fixed shares, by as many tasks as workers."""
    tasks = [
        threading.Thread(target=run, args=(step, Share(index, workers)), daemon=True)
        for index in range(workers)
    ]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()


def main() -> None:
    """Measure all, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--units", type=int, default=40, help="units per worker (default 40)")
    parser.add_argument("--seconds", type=float, default=0.25, help="duration of a unit (default 0.25)")
    parser.add_argument("--tiny", action="store_true", help="a few small units, to see that it runs")
    arguments = parser.parse_args()
    workers, seconds = arguments.workers, arguments.seconds
    units, empty = workers * arguments.units, EMPTY_UNITS
    if arguments.tiny:
        workers, seconds, units, empty = 3, 0.05, 30, (10, 40)

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name, connected(Ray()):
        times = []
        for count in empty:
            start = time.perf_counter()
            run(EmptyStep(count), Ray(actors=1))
            times.append(time.perf_counter() - start)
        overhead = (times[1] - times[0]) / (empty[1] - empty[0]) * 1e3

        rows = {}
        for engine in ("share", "ray"):
            folder = Path(name) / engine
            folder.mkdir()
            step = SleepingStep(folder, units, workers, seconds)
            if engine == "ray":
                run(step, Ray(actors=workers))
            else:
                on_array(step, workers)
            rows[engine] = (*idle_share(step, folder, workers), loads(folder))
    ray.shutdown()

    print(f"{units} units of {seconds} s on {workers} workers, of which one takes twice as long")
    print("| engine | idle share | seconds | loads of a model |")
    print("|---|---|---|---|")
    for engine, (idle, took, loaded) in rows.items():
        print(f"| {engine} | {idle:.1%} | {took:.1f} | {loaded} |")
    idle, _, loaded = rows["ray"]
    goals = {
        "overhead of a unit on Ray, ms": at_most(overhead, MAX_OVERHEAD_MS),
        f"idle share on Ray, one of {workers} workers at half speed": at_most(idle, MAX_IDLE),
        "loads of a model per worker on Ray": at_most(loaded / workers, 1),
    }
    for name, goal in goals.items():
        print(f"{name}: {goal}")
    print(conditions())
    figures = {engine: [round(float(value), 4) for value in row] for engine, row in rows.items()}
    print_goals("engines", goals, workers=workers, units=units, results=figures)


if __name__ == "__main__":
    main()
