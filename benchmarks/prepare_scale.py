"""Scaling of data preparation: CPU, memory and requests of its steps, and what follows for a billion pairs.

Synthetic metadata without images: scan tables for the finish of `plan`, commits with payloads of some bytes
for `snapshot`, `verify`, `gc` and `report`. Every step runs in a process of its own, whose CPU seconds and
peak memory are measured; wall times depend on what else the machine does. Requests are counted at the store,
where each call of a bucket's backend is one. `python -m benchmarks.prepare_scale [--rows 1e5 1e6] [--tiny]`
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.fft

from data_prep.config import BucketConfig, DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.garbage import collect_garbage
from data_prep.dataset.parts import PLAN_KEY, committed, register_family
from data_prep.dataset.schema import PAIRS, Commit, Family, Manifest
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.images.buckets import make_buckets
from data_prep.plan import dedupe
from data_prep.plan.plan import check_settings, run_plan
from data_prep.plan.scan import SCAN
from data_prep.plan.scan_tables import BATCH_ROWS, scan_key
from data_prep.store.entry import Entry
from data_prep.store.local import LocalFolder
from data_prep.store.store import Store, StoredFile, open_store
from model.common.records import seal
from model.common.share import Share

FILE_ROWS = 10_000
"""Rows of a source file, as in a tar of img2dataset."""
PART_ROWS = 1024
COMMIT_ROWS = 64
"""Rows of a part of the steps that read commits: small, so that few rows have many."""
FAMILIES = (
    Family("latents", "latents", {"model": "a"}),
    Family("llm_a", "text", {"model": "b"}),
    Family("llm_b", "text", {"model": "c"}),
)
BILLION = 1_000_000_000
COMMITS = 1_000_000
"""Commits of the goals of `snapshot`: a billion pairs in parts of 4,096 rows, four kinds."""
CORES, VERIFY_TASKS = 32, 16
ALIKE = (24_000, 96_000)
NOTES = (
    "CPU seconds are without imports. Figures of a billion rows and of a million commits are",
    "extrapolated: `plan` by its time per row at the largest size, without requests and their latency,",
    "commits by the line through the smallest and the largest size. The store is a local folder, so the",
    "steps that read commits include walking it. On S3 a request adds its latency, and with boto3 about 2",
    "ms of CPU. A comparison is a Hamming distance that is computed, of all 20 passes together; equal hashes",
    "are found by sorting. GETs per second, and path-only rows under latency, are measured by",
    "`benchmarks.small_gets`. Not measured: a real endpoint.",
)
RESULTS = Path(__file__).parent / "results" / "prepare_scale.md"


class Cost(NamedTuple):
    """Cost of a step."""

    cpu: float
    """CPU seconds, without those of imports."""
    peak: float
    """Bytes."""
    requests: dict[str, int]


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


def config_of(folder: Path, near: bool) -> DatasetConfig:
    """Return the settings of the synthetic dataset."""
    return DatasetConfig(
        name="ds",
        store=str(folder),
        workers=0,
        part_rows=PART_ROWS,
        buckets=BucketConfig(resolution=256, max_aspect=2.0, step=64),
        dedupe=DedupeConfig(near=3 if near else None),
        sources=[SourceConfig(path=str(folder))],
    )


def write_scan(folder: Path, rows: int, near: bool) -> None:
    """Write the scan tables of a dataset: 2 % exact duplicates, 1 % near ones, 5 % filtered."""
    config, dataset = config_of(folder, near), open_store(str(folder), create=True).sub("ds")
    check_settings(config, dataset, create=True)
    files = -(-rows // FILE_ROWS)
    dataset.put_new("scan/sources.json", seal({"sources": [{"files": files, "ignored": {}}]}))
    names = [[number, 0, f"{number:05d}.tar", "v"] for number in range(files)]
    dataset.put_new("scan/files.json", seal({"files": names}))

    rng = np.random.default_rng(0)
    buckets = np.array([bucket.name for bucket in make_buckets(config.buckets)])
    for number in range(files):
        count = min(FILE_ROWS, rows - number * FILE_ROWS)
        ids = np.arange(count) + (number << 32)
        hashes = rng.integers(1, 1 << 63, count, np.uint64)
        copies = rng.random(count) < 0.02
        hashes[copies] = rng.integers(1, 1 + rows // 20, int(copies.sum()))
        alike = rng.integers(0, 1 << 63, count, np.uint64)
        alike[rng.random(count) < 0.01] = alike[0]
        reasons = np.where(rng.random(count) < 0.05, "min_side: below 256", "")
        texts = [f"a caption of about eighty letters, as web pages have them, number {id}" for id in ids]
        captions = pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1), pa.int32()),
            pa.StructArray.from_arrays(
                [pa.array(np.zeros(count, np.uint8)), pa.array(texts)], ["kind", "text"]
            ),
        )
        columns = {
            "id": ids,
            "key": [f"{id:012x}" for id in ids],
            "reason": reasons,
            "detail": [""] * count,
            "captions": captions.cast(SCAN.field("captions").type),
            "refused": pa.array([[]] * count, SCAN.field("refused").type),
            "height": np.full(count, 512),
            "width": np.full(count, 512),
            "hash": hashes,
            "phash": alike if near else pa.nulls(count),
            "bucket": buckets[rng.integers(0, len(buckets), count)],
            "offset": np.arange(count) * 100_000,
            "length": np.full(count, 90_000),
            "path": [""] * count,
        }
        table = pa.table({name: pa.array(columns[name], SCAN.field(name).type) for name in SCAN.names})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=BATCH_ROWS, compression="zstd", write_page_checksum=True)
        dataset.put_new(scan_key(number), sink.getvalue())


def write_commits(folder: Path, parts: int) -> None:
    """Write the commits of a dataset's pairs and families, with payloads of a few bytes."""
    dataset = open_store(str(folder), create=True).sub("ds")
    config = config_of(folder, near=False)
    check_settings(config, dataset, create=True)
    manifest = Manifest("ds", ["original"], {"256x256": [COMMIT_ROWS] * parts})
    for family in FAMILIES:
        register_family(dataset, family, None)
    rng = np.random.default_rng(0)
    files = max(1, parts * COMMIT_ROWS // FILE_ROWS)
    written: Counter[int] = Counter()
    root = dataset.local_path("x")
    assert root is not None
    for part in manifest.parts:
        # A part of a shuffled window has rows of some forty source files.
        counts = {f"file {file} written": 1 for file in rng.integers(0, files, 40).tolist()}
        rest = COMMIT_ROWS - sum(counts.values())
        counts["file 0 written"] = counts.get("file 0 written", 0) + rest
        written.update({int(name.split()[1]): count for name, count in counts.items()})
        attempt, ids = f"{rng.integers(0, 1 << 62):016x}", f"{rng.integers(0, 1 << 62):016x}"
        for kind in (PAIRS, *FAMILIES):
            name = kind if isinstance(kind, str) else kind.name
            key = part.payload_key(name, attempt, "pairs.tar" if name == PAIRS else "shard.00000.mds")
            commit = Commit(
                name,
                part.bucket,
                part.number,
                COMMIT_ROWS,
                attempt,
                ids,
                [StoredFile(key, 4, "0" * 16)],
                "" if isinstance(kind, str) else kind.hash,
                {"planned": COMMIT_ROWS, **counts} if name == PAIRS else {"tokens": 1000},
            )
            # Without the store's fsync, which only the disk's speed would show in.
            for path, data in ((key, b"data"), (part.commit_key(name), commit.to_json())):
                target = root.parent / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    rows = [
        {
            "number": number,
            "label": f"0:{number}",
            "rows": written[number],
            "kept": written[number],
            "dropped": {},
        }
        for number in range(files)
    ]
    captions: dict[str, Any] = {"kept": {"original": parts}, "letters": {"original": parts}, "refused": {}}
    dataset.put_new(PLAN_KEY, seal({"files": rows, "captions": captions, "manifest": {}}))
    dataset.put_new(Manifest.KEY, manifest.to_json())


def finish(dataset: Store, folder: Path, rows: int) -> None:
    """Finish a plan that is scanned."""
    run_plan(config_of(folder, near=False), dataset, Share())


def finish_near(dataset: Store, folder: Path, rows: int) -> None:
    """Finish a plan that is scanned, with near duplicates."""
    run_plan(config_of(folder, near=True), dataset, Share())


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
    """Read all commits, which is what takes `report` long."""
    for kind in (PAIRS, *(family.name for family in FAMILIES)):
        committed(dataset, kind)


class Step(NamedTuple):
    """A step to measure."""

    run: Callable[[Store, Path, int], None]
    write: Callable[[Path, int], None]


STEPS = {
    "plan": Step(finish, lambda folder, rows: write_scan(folder, rows, near=False)),
    "plan, near": Step(finish_near, lambda folder, rows: write_scan(folder, rows, near=True)),
    "snapshot": Step(snapshot, lambda folder, rows: write_commits(folder, rows // COMMIT_ROWS)),
    "snapshot again": Step(snapshot, lambda folder, rows: None),
    "verify, 1 of 16": Step(verify_share, lambda folder, rows: None),
    "gc": Step(gc, lambda folder, rows: None),
    "report's commits": Step(report, lambda folder, rows: None),
}
"""Name -> step; a step whose `write` does nothing takes the dataset of the one before."""


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
    return Cost(cpu, usage.ru_maxrss * 1024, figures["requests"])


def run_step(step: str, folder: Path, rows: int) -> None:
    """Run a step, and print the requests and the CPU seconds of the imports."""
    times = os.times()
    backend = Counting(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        STEPS[step].run(Store(backend, "ds/"), folder, rows)
    print(json.dumps({"imports": times.user + times.system, "requests": dict(backend.requests)}))


def alike_hashes(count: int, seed: int) -> np.ndarray:
    """Return pHashes, uint64 [count], of rendered products: one to three bodies on white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)
    hashes = []
    for start in range(0, count, 2048):
        size = min(2048, count - start)
        image = np.full((size, 32, 32), 255.0, np.float32)
        bodies = rng.choice([1, 2, 3], size, p=[0.6, 0.25, 0.15])
        for body in range(3):
            center, radius = rng.normal(15.5, 2, (2, size, 1, 1)), rng.uniform(4, 13, (2, size, 1, 1))
            distance = np.hypot((y - center[0]) / radius[0], (x - center[1]) / radius[1])
            cover = np.clip((1 - distance) * radius.min(0) + 0.5, 0, 1) * (bodies > body)[:, None, None]
            image = image * (1 - cover) + cover * rng.uniform(0, 220, (size, 1, 1))
        waves = np.asarray(scipy.fft.dct(np.asarray(scipy.fft.dct(np.floor(image), axis=1)), axis=2))
        waves = waves[:, :8, :8].reshape(size, 64)
        bits = waves > np.median(waves, axis=1, keepdims=True)
        hashes.append(np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel())
    return np.concatenate(hashes)


def different_hashes(count: int, seed: int) -> np.ndarray:
    """Return hashes, uint64 [count], that agree on half of their bits with many others, and are near few."""
    rng = np.random.default_rng(seed)
    shared = np.uint64(0x00FF00FF00FF00FF)
    few = rng.integers(0, 1 << 63, 40, np.uint64)[rng.integers(0, 40, count)]
    return (few & shared) | (rng.integers(0, 1 << 63, count, np.uint64) & ~shared)


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


def formulas(rows: int, cost: dict[str, Cost]) -> Iterator[tuple[str, str, int, int]]:
    """Yield step, formula, its value, and the requests counted."""
    files, parts, kinds = -(-rows // FILE_ROWS), rows // COMMIT_ROWS, 1 + len(FAMILIES)
    total = {step: sum(entry.requests.values()) for step, entry in cost.items()}
    groups = max(1, files * FILE_ROWS * 80 // (64 << 20))
    value = 3 * files + rows // 2**20 + rows // (PART_ROWS * 16) + 10 * groups + groups * groups + 60
    yield "plan", "3 F GET, F PUT (dropped), P / 16 PUT, some per group", value + files, total["plan"]
    objects = kinds * parts
    yield (
        "snapshot",
        "K P GET, LIST K P / 1000 (no roll-up yet)",
        objects + 3 * objects // 1000 + 60,
        total["snapshot"],
    )
    again = 4 * (objects // 1000 + kinds) + 40
    yield "snapshot again", "LIST 2 K P / 1000, a GET per roll-up", again, total["snapshot again"]
    share = objects // VERIFY_TASKS + 3 * (objects // 1000 + kinds) + 60
    yield "verify, 1 of 16", "K P / 16 GET, LIST 2 K P / 1000", share, total["verify, 1 of 16"]
    yield "gc", "LIST all, a GET per roll-up", 6 * (objects // 1000 + kinds) + 60, total["gc"]


def table(sizes: list[int], costs: dict[int, dict[str, Cost]]) -> list[str]:
    """Return the lines of the tables."""
    lines = ["", "| step | rows | CPU s | us per row | peak MB | requests |", "|---|---|---|---|---|---|"]
    for step in STEPS:
        for rows in sizes:
            cost = costs[rows][step]
            requests = ", ".join(f"{count:,} {kind}" for kind, count in sorted(cost.requests.items()))
            per_row = 1e6 * cost.cpu / rows
            lines.append(
                f"| {step} | {rows:,} | {cost.cpu:.1f} | {per_row:.2f} | {cost.peak / 1e6:.0f} | {requests} |"
            )
    lines += ["", f"Requests at {sizes[-1]:,} rows beside the formulas (F files, P parts, K kinds):", ""]
    lines += ["| step | formula | at most | counted |", "|---|---|---|---|"]
    for step, formula, bound, counted in formulas(sizes[-1], costs[sizes[-1]]):
        lines.append(f"| {step} | {formula} | {bound:,} | {counted:,} |")
    return lines


def main() -> None:
    """Measure all steps, print the tables, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6])
    parser.add_argument("--tiny", action="store_true", help="a few rows, to see that it runs; keeps no table")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "FOLDER", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step[0], Path(arguments.step[1]), int(arguments.step[2]))
        return

    sizes = [20_000] if arguments.tiny else [int(rows) for rows in arguments.rows]
    costs: dict[int, dict[str, Cost]] = {rows: {} for rows in sizes}
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="li-dit-scale-") as folder:
            place = Path(folder)
            for number, (name, step) in enumerate(STEPS.items()):
                if name in ("plan", "plan, near", "snapshot"):
                    place = Path(folder) / str(number)
                    step.write(place, rows)
                costs[rows][name] = measure(name, place, rows)
                print(f"{name}, {rows:,} rows: {costs[rows][name]}", file=sys.stderr)
    finish_report(sizes, costs, [200, 400] if arguments.tiny else list(ALIKE), keep=not arguments.tiny)


def at_commits(sizes: list[int], costs: dict[int, dict[str, Cost]], step: str) -> Cost:
    """Return what a step takes at `COMMITS`, by the line through the smallest and the largest size."""
    kinds = 1 + len(FAMILIES)
    first, last = costs[sizes[0]][step], costs[sizes[-1]][step]
    # One size has no slope: then through nothing, which is an upper bound.
    few = kinds * (sizes[0] // COMMIT_ROWS) if len(sizes) > 1 else 0
    many = kinds * (sizes[-1] // COMMIT_ROWS)
    low = first if few else Cost(0.0, 0.0, {})
    steps = (COMMITS - few) / (many - few)
    return Cost(low.cpu + (last.cpu - low.cpu) * steps, low.peak + (last.peak - low.peak) * steps, {})


def finish_report(sizes: list[int], costs: dict[int, dict[str, Cost]], alike: list[int], keep: bool) -> None:
    """Print the tables and the goals, and keep them if asked."""
    from benchmarks.reporting import Goal, at_most, conditions, print_goals  # imports torch

    largest = sizes[-1]
    lines = ["# Data preparation at scale", "", conditions(), *table(sizes, costs)]
    lines += ["", "| hashes | rows | comparisons per row | near an earlier row |", "|---|---|---|---|"]
    compared: dict[tuple[str, int], float] = {}
    for name, make in (("products on white", alike_hashes), ("alike, near few", different_hashes)):
        for count in alike:
            compared[name, count], part = comparisons(make(count, 0))
            lines.append(f"| {name} | {count:,} | {compared[name, count]:.2f} | {part:.0%} |")

    cost = costs[largest]
    hours = cost["plan"].cpu / largest * BILLION / CORES / 3600
    again, verified = (at_commits(sizes, costs, step) for step in ("snapshot again", "verify, 1 of 16"))
    goals: dict[str, Goal] = {
        "plan_hours_at_1e9_on_32_cores": at_most(hours, 1.0),
        "plan_peak_gb": at_most(cost["plan"].peak / 1e9, 2.0),
        "snapshot_minutes_at_1e6_commits": at_most(again.cpu / 60, 3.0),
        "snapshot_peak_gb_at_1e6_commits": at_most(again.peak / 1e9, 2.0),
        "verify_cpu_minutes_per_task_of_16": at_most(verified.cpu / 60, 10.0),
        "comparisons_per_row_products": at_most(compared["products on white", alike[0]], 5.0),
        "comparisons_per_row_products_96k": at_most(compared["products on white", alike[1]], 5.0),
        "comparisons_per_row_alike": at_most(compared["alike, near few", alike[1]], 5.0),
    }
    lines += ["", "| goal | |", "|---|---|", *(f"| {name} | {goal} |" for name, goal in goals.items())]
    lines += ["", *NOTES]
    print("\n".join(lines))
    if keep:
        RESULTS.write_text("\n".join(lines) + "\n")
    print_goals("prepare_scale", goals)


if __name__ == "__main__":
    main()
