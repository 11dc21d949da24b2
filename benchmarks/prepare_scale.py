"""Scaling of data preparation: CPU, memory and requests of its steps, and what follows for a billion pairs.

Synthetic metadata without images: scan tables for the finish of `plan`, commits with small payloads for
`snapshot`, `verify`, `gc` and `report` (`prepare_data`). Every step runs in a process of its own, whose CPU
seconds and peak memory are measured; wall times depend on what else the machine does. Requests are counted at
a local folder, where each call that a bucket would get is one, and at an S3 server on this machine
(`prepare_requests`). `python -m benchmarks.prepare_scale [--rows 1e5 1e6] [--folder /dev/shm] [--tiny]`
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.prepare_data import (
    BILLION,
    COMMIT_ROWS,
    alike_hashes,
    config_of,
    different_hashes,
    write_commits,
    write_scan,
)
from benchmarks.prepare_requests import LAYOUTS, TASKS, Layout, count_requests
from benchmarks.prepare_tables import STEP_NAMES, VERIFY_TASKS, Cost, Figures, Unit, goals_of, tables
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.plan import dedupe, finish, units
from data_prep.plan.duplicates import rows_of_slice
from data_prep.plan.listing import FOLDER
from data_prep.plan.packs import pack, read_section
from data_prep.plan.plan import run_plan
from data_prep.report import write_report
from data_prep.store.entry import Entry
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, open_store
from model.common.share import Share

ALIKE = (24_000, 96_000, 384_000)
TINY_ALIKE = (200, 400, 800)
RESULTS = Path(__file__).parent / "results" / "prepare_scale.md"


class Counting(LocalFolder):
    """A folder that counts the requests that a bucket would get."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: Counter[str] = Counter()

    def local_path(self, key: str) -> Path | None:
        """Return None, as a bucket does."""
        return None

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Count a GET."""
        self.requests["GET"] += 1
        return super().read(key, max_bytes)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Count a GET."""
        self.requests["GET"] += 1
        return super().read_range(key, start, length)

    def stream(self, key: str, start: int) -> Iterator[bytes]:
        """Count a GET."""
        self.requests["GET"] += 1
        yield from super().stream(key, start)

    def size(self, key: str) -> int | None:
        """Count a HEAD."""
        self.requests["HEAD"] += 1
        return super().size(key)

    def version(self, key: str) -> str | None:
        """Count a HEAD."""
        self.requests["HEAD"] += 1
        return super().version(key)

    def put(self, key: str, data: bytes | Path) -> None:
        """Count a PUT."""
        self.requests["PUT"] += 1
        super().put(key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Count a PUT."""
        self.requests["PUT"] += 1
        return super().put_new(key, data)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Count a LIST per 1,000 objects."""
        found = list(super().entries(prefix))
        self.requests["LIST"] += max(1, -(-len(found) // 1000))
        yield from found

    def folders(self, prefix: str) -> list[str]:
        """Count a LIST."""
        self.requests["LIST"] += 1
        return super().folders(prefix)

    def delete_many(self, keys: Any) -> None:
        """Count a POST per 1,000 objects."""
        self.requests["POST"] += -(-len(keys) // 1000)
        super().delete_many(keys)


class TimedStep(units.PlanStep):
    """A step of the finish that measures the CPU seconds of each unit."""

    seconds: ClassVar[defaultdict[str, list[float]]] = defaultdict(list)
    """Step -> CPU seconds of its units, without the write of their objects."""

    def __init__(self, dataset: Store, step: str, keys: Any, make: Callable[[int], bytes]) -> None:
        """Do nothing yet."""

        def timed(number: int) -> bytes:
            began = time.process_time()
            data = make(number)
            self.seconds[step].append(time.process_time() - began)
            return data

        super().__init__(dataset, step, keys, timed)


def finish_plan(dataset: Store, folder: Path, rows: int, near: bool = False) -> None:
    """Finish a plan that is scanned, in groups of the size that those of a billion rows have."""
    bytes = scan_bytes(dataset) * BILLION // rows // finish.WANTED_GROUPS
    with (
        mock.patch.object(finish, "MIN_GROUP_BYTES", min(finish.MAX_GROUP_BYTES, bytes)),
        mock.patch.object(units, "PlanStep", TimedStep),
    ):
        run_plan(config_of(folder, near), dataset, Share())


def scan_bytes(dataset: Store) -> int:
    """Return the bytes of all scan tables."""
    return sum(entry.bytes for entry in dataset.listing(f"{FOLDER}/") if entry.key.endswith(".parquet"))


def finish_near(dataset: Store, folder: Path, rows: int) -> None:
    """Finish a plan that is scanned, with near duplicates."""
    finish_plan(dataset, folder, rows, near=True)


def snapshot(dataset: Store, folder: Path, rows: int) -> None:
    """Take a snapshot."""
    take_snapshot(dataset)


def verify_share(dataset: Store, folder: Path, rows: int) -> None:
    """Do the first of sixteen shares of `verify`."""
    assert verify(dataset, share=Share(0, VERIFY_TASKS)).problems == []


def gc(dataset: Store, folder: Path, rows: int) -> None:
    """Look for garbage."""
    assert collect_garbage(dataset) == []


def report(dataset: Store, folder: Path, rows: int) -> None:
    """Write the report."""
    write_report(config_of(folder, near=False), dataset, folder / "report.html")


class Step(NamedTuple):
    """A step to measure."""

    run: Callable[[Store, Path, int], None]
    write: Callable[[Path, int], None] | None = None
    """Writes its dataset; None = that of the step before."""


STEPS = {
    "plan": Step(finish_plan, lambda folder, rows: write_scan(folder, rows, near=False)),
    "plan, near": Step(finish_near, lambda folder, rows: write_scan(folder, rows, near=True)),
    "snapshot": Step(snapshot, lambda folder, rows: write_commits(folder, rows // COMMIT_ROWS)),
    "snapshot again": Step(snapshot),
    "verify, 1 of 16": Step(verify_share),
    "gc": Step(gc),
    "report": Step(report),
}
"""Name -> step."""
assert tuple(STEPS) == STEP_NAMES


def measure(step: str, folder: Path, rows: int) -> Cost:
    """Run a step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prepare_scale", "--step", step, str(folder), str(rows)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"step {step} of {rows} rows ended with code {process.returncode}")
    figures = json.loads(output.splitlines()[-1])
    # The kernel counts in kB.
    cpu = usage.ru_utime + usage.ru_stime - figures["imports"]
    made = {name: Unit(*unit) for name, unit in figures["units"].items()}
    return Cost(cpu, usage.ru_maxrss * 1024, figures["requests"], made)


def run_step(step: str, folder: Path, rows: int) -> None:
    """Run a step, and print the requests, the units and the CPU seconds of the imports."""
    times = os.times()
    backend = Counting(folder)
    TimedStep.seconds.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        STEPS[step].run(Store(backend, "ds/"), folder, rows)
    made = {name: Unit(len(all), sum(all), max(all)) for name, all in TimedStep.seconds.items()}
    figures = {"imports": times.user + times.system, "requests": dict(backend.requests), "units": made}
    print(json.dumps(figures))


def sliced_seconds(folder: Path, rows: int = 1 << 22, repetitions: int = 4) -> float:
    """Return the CPU seconds per row in which a unit of the near duplicates reads rows of another slice."""
    dataset = open_store(str(folder), create=True)
    some = np.empty(rows, dedupe.ROW)
    some["hash"], some["id"] = np.random.default_rng(0).integers(0, 1 << 63, rows, np.uint64), np.arange(rows)
    dataset.put("pack", pack([some.tobytes(), b""]))
    mask = dedupe.bit_mask(dedupe.block_choices(BILLION, 3)[0])
    began = time.process_time()
    for part in range(repetitions):
        section = read_section(dataset, "pack", 0, 2)
        rows_of_slice(np.frombuffer(section, dedupe.ROW), mask, part, 64)
    return (time.process_time() - began) / (rows * repetitions)


def comparisons(hashes: np.ndarray) -> tuple[float, float]:
    """Return comparisons per row with the keys of a billion rows, and the part of the rows that is found."""
    rows = np.empty(len(hashes), dedupe.ROW)
    rows["hash"], rows["id"] = hashes, np.arange(len(hashes))
    count, found = 0, set[int]()
    for blocks in dedupe.block_choices(BILLION, 3):
        ids, compared = dedupe.near_in_group(rows, blocks, 3)
        count += compared
        found.update(ids.tolist())
    return count / len(rows), len(found) / len(rows)


def measure_all(arguments: argparse.Namespace) -> Figures:
    """Measure all steps, requests and comparisons."""
    sizes = [20_000] if arguments.tiny else sorted(int(rows) for rows in arguments.rows)
    costs: dict[int, dict[str, Cost]] = {rows: {} for rows in sizes}
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="li-dit-scale-", dir=arguments.folder) as folder:
            place = Path(folder)
            for number, (name, step) in enumerate(STEPS.items()):
                if step.write is not None:
                    place = Path(folder) / str(number)
                    step.write(place, rows)
                costs[rows][name] = measure(name, place, rows)
                print(f"{name}, {rows:,} rows: {costs[rows][name]}", file=sys.stderr)

    compared: dict[str, list[tuple[int, float, float]]] = {}
    for name, make in (("products on white", alike_hashes), ("alike, near few", different_hashes)):
        counts = TINY_ALIKE if arguments.tiny else ALIKE
        compared[name] = [(count, *comparisons(make(count, 0))) for count in counts]
    with tempfile.TemporaryDirectory(prefix="li-dit-scale-", dir=arguments.folder) as folder:
        sliced = sliced_seconds(Path(folder) / "packs", 1 << 16 if arguments.tiny else 1 << 22)
        layouts = (Layout(3, 8, 8), Layout(3, 8, 2)) if arguments.tiny else LAYOUTS
        found = count_requests(Path(folder), layouts, TASKS[:2] if arguments.tiny else TASKS)
    return Figures(costs, compared, sliced, found)


def main() -> None:
    """Measure, print the tables, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--folder", help="folder for the data, such as a RAM disk; it is emptied again")
    parser.add_argument("--tiny", action="store_true", help="a few rows, to see that it runs; keeps no table")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "FOLDER", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the tables")
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step[0], Path(arguments.step[1]), int(arguments.step[2]))
        return

    figures = measure_all(arguments)
    from benchmarks.reporting import conditions, print_goals  # imports torch

    lines = ["# Data preparation at scale", "", conditions(), *tables(figures)]
    print("\n".join(lines))
    if not arguments.tiny:
        arguments.out.write_text("\n".join(lines) + "\n")
    print_goals("prepare_scale", goals_of(figures))


if __name__ == "__main__":
    main()
