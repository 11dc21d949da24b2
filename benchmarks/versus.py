"""Processor time of `pairs` and of the loader in two checkouts, which take turns in one run.

    git worktree add ../before COMMIT
    python -m benchmarks.versus ../before [--turns 20] [--images 240] [--batches 300]

Answers whether a change made either slower. Each turn is a process of its own in one of the checkouts, on the
same images, works without further ones, and counts its processor time after all imports. The ratio is taken
within each turn, so that what slows the machine slows both; its interval is by the bootstrap over turns.
The other checkout needs the folders of this one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.captions import dense_captions
from benchmarks.pairs import make_jpegs, write_source
from benchmarks.reporting import at_most, conditions, print_goals

ROOT = Path(__file__).parents[1]
LIMIT = 1.02
RESAMPLES = 10_000

# What both programs begin with.
CLOCK = """
import json, sys
from pathlib import Path
from time import process_time
arguments = json.loads(sys.argv[1])
"""
PAIRS = (
    CLOCK
    + """
from data_prep.config import BucketConfig, DatasetConfig, SourceConfig
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.share import Share
source = SourceConfig(path=arguments["source"])
config = DatasetConfig(name="versus", store=arguments["store"], sources=[source],
                       buckets=BucketConfig(resolution=512), part_rows=256, workers=0)
dataset = open_store(config.store, create=True).sub(config.name)
run_plan(config, dataset, Share())
began = process_time()
run_pairs(config, dataset, Share())
print(json.dumps(1e3 * (process_time() - began) / arguments["count"]))
"""
)
LOADER = (
    CLOCK
    + """
from benchmarks import loader
folder = Path(arguments["store"])
folder.mkdir()
loader.write_ours(str(folder / "snapshot"), 4 * loader.PART_ROWS, folder)
began = process_time()
loader.ours(str(folder / "snapshot"), folder / "cache", 0, arguments["count"], 20)
print(json.dumps(1e3 * (process_time() - began) / arguments["count"] / loader.BATCH))
"""
)
PROGRAMS = {"pairs": PAIRS, "loader": LOADER}


def measure(checkout: Path, program: str, source: Path, count: int) -> float:
    """Run a program in a checkout; return the milliseconds of processor time per item."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"source": str(source), "store": f"{folder}/store", "count": count}
        command = [sys.executable, "-c", program, json.dumps(arguments)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr.strip()[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def median_ratio(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios of the turns, and the bounds of its 95 % interval."""
    ratios = np.array(after) / np.array(before)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main(arguments: list[str] | None = None) -> None:
    """Entry of `python -m benchmarks.versus`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="checkout of the commit before")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--images", type=int, default=240, help="of `pairs`, in each turn")
    parser.add_argument("--batches", type=int, default=300, help="of the loader, in each turn")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "in", make_jpegs(options.images), dense_captions(options.images))
        items = {"pairs": (folder / "in", options.images), "loader": (folder, options.batches)}

        sides = {"before": options.other, "after": ROOT}
        times: dict[str, dict[str, list[float]]] = {what: {side: [] for side in sides} for what in PROGRAMS}
        for turn in range(options.turns):
            # The side that begins changes, so that neither is always second.
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                for what, program in PROGRAMS.items():
                    times[what][side].append(measure(sides[side], program, *items[what]))

    print(f"\n{conditions()}; {options.turns} turns\n")
    print("| | before, ms: median (least) | after | median of the ratios | 95 % interval |")
    print("|---|---|---|---|---|")
    goals = {}
    for what, by_side in times.items():
        before, after = by_side["before"], by_side["after"]
        ratio, low, high = median_ratio(before, after)
        print(
            f"| {what} | {np.median(before):.2f} ({min(before):.2f}) | {np.median(after):.2f} "
            f"({min(after):.2f}) | {ratio:.3f} | {low:.3f} to {high:.3f} |"
        )
        goals[f"{what}_after_over_before"] = at_most(ratio, LIMIT)
    print_goals("versus", goals)


if __name__ == "__main__":
    main()
