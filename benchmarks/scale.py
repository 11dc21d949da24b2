"""Start-up time and memory of a rank's data plan, from a million to a billion samples.

For each size, an index as a snapshot has it (parts of 4,096 rows, 11 buckets, three families) is written to a
local folder. Then a fresh process does the work of a rank before its first batch: read and check the index,
map it, plan the epoch, go to a random position, ask for batches. `python -m benchmarks.scale [--largest 1e9]`
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from benchmarks.reporting import at_most, conditions, print_goals
from data_prep.dataset.schema import Family, Snapshot
from data_prep.store.store import open_store
from pipeline.data.epoch_plan import EpochPlan
from pipeline.data.part_files import PartIndex
from pipeline.data.shard_cache import ShardCache

PART_ROWS, BUCKETS, FAMILIES = 4096, 11, ("latents", "llm_a", "llm_b")
GLOBAL_BATCH, LANES, WORLD = 2048, 64, 512
GOAL_SECONDS, GOAL_BYTES = 60.0, 2e9
RESULTS = Path(__file__).parent / "results" / "scale.md"


def write_snapshot(folder, samples):
    """Write a snapshot's record and its indexes, without payloads."""
    dataset = open_store(str(folder), create=True).sub("ds")
    rng = np.random.default_rng(0)
    buckets, data = {}, {}

    for number in range(BUCKETS):
        bucket = f"{256 + 32 * number}x{512 - 16 * number}"
        parts = max(samples // BUCKETS // PART_ROWS, 1)
        rows = np.full(parts, PART_ROWS)
        rows[-1] = PART_ROWS // 2 + number
        columns = {"number": np.arange(parts), "rows": rows, "ids_xxh64": hexes(rng, parts)}

        for family in FAMILIES:
            attempts = hexes(rng, parts)
            columns[f"{family}.key"] = [
                f"families/{family}/{bucket}/{part:05d}/{attempt}/shard.00000.mds"
                for part, attempt in enumerate(attempts)
            ]
            columns[f"{family}.bytes"] = np.full(parts, 400_000_000)
            columns[f"{family}.xxh64"] = hexes(rng, parts)

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
        data[bucket] = sink.getvalue()
        digest = xxhash.xxh64_hexdigest(data[bucket])
        buckets[bucket] = {"parts": parts, "rows": int(rows.sum()), "content": bucket, "index_xxh64": digest}

    families = {
        name: Family(name, "latents" if name == "latents" else "text", {"model": name}) for name in FAMILIES
    }
    snapshot = Snapshot("ds", ["original"], families, buckets, {})

    for bucket, index in data.items():
        dataset.put_new(snapshot.index_key(bucket), index)

    dataset.put_new(snapshot.key, snapshot.to_json())
    return snapshot


def hexes(rng, count):
    """Return random words of 16 hex digits."""
    return [f"{word:016x}" for word in rng.integers(0, 2**63, count).tolist()]


def start_rank(folder, cache, id):
    """Do the work of a rank before its first batch, and print its figures as JSON."""
    figures: dict[str, float] = {"imports_bytes": peak()}
    begun = time.perf_counter()
    dataset = open_store(folder).sub("ds")
    snapshot = Snapshot.from_json(dataset.read(f"snapshots/{id}/snapshot.json"))
    index = PartIndex(ShardCache(dataset, Path(cache), id, None), snapshot)
    parts = {bucket: index.rows(bucket) for bucket in snapshot.buckets}
    figures["index_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    plan = EpochPlan(0, 3, parts, GLOBAL_BATCH, LANES, 8)
    figures["plan_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    rank, middle = 137, len(plan) // 2
    rows = plan.batch(middle, rank, WORLD)
    files = [
        index.file(rows.bucket, int(part), family) for part in set(rows.parts.tolist()) for family in FAMILIES
    ]
    figures["first_batch_seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    following = min(middle + 2000, len(plan))

    for number in range(middle, following):
        plan.batch(number, rank, WORLD)

    figures["batch_microseconds"] = (time.perf_counter() - begun) / max(following - middle, 1) * 1e6
    figures |= {
        "batches": len(plan),
        "files": len(files),
        "peak_bytes": peak(),
        "left_over": sum(plan.left_over().values()),
    }

    print(json.dumps(figures))


def peak():
    """Largest resident memory of this process. getrusage would also count the parent before the start."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measure(samples):
    """Write a snapshot of that size and start two ranks on it."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot = write_snapshot(f"{folder}/store", samples)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        runs = []

        for _ in ("first on its node", "second"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.scale",
                "--rank",
                f"{folder}/store",
                f"{folder}/cache",
                snapshot.id,
            ]

            begun = time.perf_counter()
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]) | {"seconds": time.perf_counter() - begun})

        shared = len([name for name in os.listdir("/dev/shm") if name.startswith("0")])
        parts = sum(record["parts"] for record in snapshot.buckets.values())
        return {
            "samples": samples,
            "parts": parts,
            "index_bytes": size,
            "shared_memory_files": shared,
            "runs": runs,
        }


def table(results):
    """The figures as Markdown."""
    lines = [
        "| samples | parts | index in the store | start, first on its node | start, others | index | plan | "
        "go to the middle | per batch | peak memory | of it imports |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    for result in results:
        first, other = result["runs"]
        lines.append(
            f"| {result['samples']:,} | {result['parts']:,} | {result['index_bytes'] / 1e6:.1f} MB | "
            f"{first['seconds']:.1f} s | {other['seconds']:.1f} s | "
            f"{first['index_seconds']:.2f} / {other['index_seconds']:.2f} s | "
            f"{first['plan_seconds']:.2f} s | "
            f"{first['first_batch_seconds'] * 1e3:.1f} ms | {first['batch_microseconds']:.0f} us | "
            f"{first['peak_bytes'] / 1e6:.0f} MB | {first['imports_bytes'] / 1e6:.0f} MB |"
        )

    return "\n".join(lines)


def main():
    """Measure, write the table, print one line of JSON at the end."""
    parser = argparse.ArgumentParser(description="Start-up time and memory of a rank's data plan")
    parser.add_argument("--largest", type=float, default=1e9, help="samples")
    parser.add_argument(
        "--rank", nargs=3, metavar=("STORE", "CACHE", "SNAPSHOT"), help="be the process that is measured"
    )
    arguments = parser.parse_args()

    if arguments.rank:
        start_rank(*arguments.rank)
        return

    results = []
    for samples in (10**6, 10**7, 10**8, 10**9):
        if samples <= arguments.largest:
            results.append(measure(samples))
            print(table(results[-1:]).splitlines()[-1], flush=True)

    worst = results[-1]["runs"][0]
    goals = {
        "seconds to start, at most": at_most(worst["seconds"], GOAL_SECONDS),
        "GB of memory, at most": at_most(worst["peak_bytes"] / 1e9, GOAL_BYTES / 1e9),
    }
    note = f"At {results[-1]['samples']:,} samples, " + "; ".join(
        f"{what}: {goal}" for what, goal in goals.items()
    )
    note += f". Global batch {GLOBAL_BATCH}, {LANES} canonical nodes, rank 137 of {WORLD}; "
    note += "starts include Python's imports."

    head = f"# Scale of the data plan\n\n`python -m benchmarks.scale`; {conditions()}."
    text = f"{head}\n\n{table(results)}\n\n{note}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)
    print_goals("scale", goals, results=results)


if __name__ == "__main__":
    main()
