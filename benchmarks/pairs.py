"""Speed of `pairs`, of a plain loop and of img2dataset's resizer, on the same JPEGs in one run.

    python -m benchmarks.pairs [--images 600] [--workers 2] [--resolution 512] [--img2dataset FOLDER]

Makes JPEGs of about 1024 px by code (smooth fields with fine detail, quality 90), packs them as a tar, and
measures: a plain loop in one process (open, convert, resize with the same filter, crop, write JPEG of the
same quality); img2dataset's resizer in one process; and the whole `pairs` step, from the tar to committed
parts, also over a source four times as large, which must not take more memory. The `plan` step, which no peer
has, is timed as well. Peak memory is the sum over all processes of the step, sampled every 20 ms.

img2dataset may be installed in an environment of its own: `python -m venv e && e/bin/pip install
img2dataset`, then `--img2dataset e/lib/python3.11/site-packages` (of the same Python version).
"""

import argparse
import importlib.util
import io
import json
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.captions import dense_captions
from benchmarks.reporting import at_least, conditions, print_goals
from data_prep.config import BucketConfig, DatasetConfig, DedupeConfig, SourceConfig
from data_prep.dataset.schema import Bucket
from data_prep.images.images import resize_crop
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import open_store
from model.common.share import Share

QUALITY = 95
GOAL = 1.5
OURS = "ours: pairs, from tar to commit"
FOUR_TIMES = "ours: pairs, four times the source"


def make_jpegs(count: int) -> list[bytes]:
    """Return JPEGs of 1024 x 1024 with large shapes and fine grain, about 200 kB each."""
    rng = np.random.default_rng(0)
    made = []

    for _ in range(count):
        field = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(
            (1024, 1024), Image.Resampling.BICUBIC
        )
        detail = Image.fromarray(rng.integers(96, 160, (256, 256, 3), np.uint8)).resize(
            (1024, 1024), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        Image.blend(field, detail, 0.4).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())

    return made


def plain_loop(images: list[bytes], resolution: int, folder: Path) -> None:
    """Resize the images as a simple script would."""
    for number, data in enumerate(images):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        resized, _ = resize_crop(image, Bucket(resolution, resolution))
        resized.save(folder / f"{number:06d}.jpg", "JPEG", quality=QUALITY, subsampling=0)


def load_resizer():
    """Load img2dataset's Resizer class from its own file, since the package's entry imports much more.

    Raises:
        ImportError: if the package, or one that it needs, is not installed.
    """
    spec = importlib.util.find_spec("img2dataset")
    if spec is None or spec.origin is None:
        raise ImportError("img2dataset is not installed")

    file = importlib.util.spec_from_file_location(
        "img2dataset_resizer", Path(spec.origin).parent / "resizer.py"
    )
    assert file is not None, "a path gives a spec"
    assert file.loader is not None, "a path gives a loader"
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)

    return module.Resizer


def resizer_loop(resizer, images: list[bytes], folder: Path) -> None:
    """Resize the images with img2dataset, and write them to files."""
    for number, data in enumerate(images):
        encoded, *_, error = resizer(io.BytesIO(data))
        if error:
            raise RuntimeError(f"img2dataset: {error}")
        (folder / f"{number:06d}.jpg").write_bytes(bytes(encoded))


def timed(step: Callable[[], object]) -> tuple[float, float, float]:
    """Run a step.

    Returns:
        Seconds; CPU seconds; and peak memory in MB, of this process (above what it used before) and its
        children.
    """
    here = psutil.Process()
    before, peak, done = here.memory_info().rss, 0, threading.Event()
    busy: dict[int, float] = {}
    busy_before = {child.pid: _cpu(child) for child in [here, *here.children(recursive=True)]}

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            used = here.memory_info().rss - before
            for child in here.children(recursive=True):
                try:
                    used += child.memory_info().rss
                    busy[child.pid] = _cpu(child)
                except psutil.NoSuchProcess:
                    continue

            peak = max(peak, used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()

    try:
        step()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()

    busy[here.pid] = _cpu(here)
    return seconds, sum(spent - busy_before.get(pid, 0) for pid, spent in busy.items()), peak / 1e6


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    """Measure all, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument(
        "--img2dataset", help="the site-packages folder of an environment that has img2dataset"
    )
    arguments = parser.parse_args()

    if arguments.img2dataset:
        sys.path.append(arguments.img2dataset)

    images = make_jpegs(arguments.images)
    captions = dense_captions(arguments.images)
    results: dict[str, dict[str, float]] = {}

    def record(name: str, processes: int, step: Callable[[], object], count: int = arguments.images) -> None:
        seconds, busy, memory = timed(step)
        rate = count / seconds
        cpu = busy / count * 1e3
        results[name] = {"images_per_s": rate, "per_core": rate / processes, "cpu_ms": cpu, "peak_mb": memory}
        print(
            f"| {name} | {processes} | {rate:.1f} | {rate / processes:.1f} | {cpu:.1f} | {memory:.0f} |",
            flush=True,
        )

    size = sum(map(len, images)) / len(images) / 1e3
    print(f"{len(images)} JPEGs of 1024 px, {size:.0f} kB each, to {arguments.resolution} px")
    print("| | processes | images/s | images/s per process | CPU ms per image | peak memory, MB |")
    print("|---|---|---|---|---|---|")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "in", images, captions)
        (folder / "plain").mkdir()
        record(
            "plain loop: open, resize, write",
            1,
            lambda: plain_loop(images, arguments.resolution, folder / "plain"),
        )

        try:
            resizer = load_resizer()(arguments.resolution, "center_crop", False, encode_quality=QUALITY)
        except ImportError as error:
            print(f"| img2dataset's resizer: not measured ({error}) | | | | | |")
        else:
            (folder / "resizer").mkdir()
            record("img2dataset's resizer", 1, lambda: resizer_loop(resizer, images, folder / "resizer"))

        config = DatasetConfig(
            name="benchmark",
            store=str(folder / "store"),
            sources=[SourceConfig(path=str(folder / "in"))],
            buckets=BucketConfig(resolution=arguments.resolution),
            part_rows=256,
            image_quality=QUALITY,
            workers=arguments.workers,
        )

        dataset = open_store(config.store, create=True).sub(config.name)
        record("ours: plan", arguments.workers, lambda: run_plan(config, dataset, Share()))
        record(OURS, arguments.workers, lambda: run_pairs(config, dataset, Share()))

        for number in range(1, 4):
            shutil.copy(folder / "in/00000.tar", folder / f"in/{number:05d}.tar")

        large = replace(config, name="large", dedupe=DedupeConfig(exact=False))
        larger = open_store(config.store).sub(large.name)
        run_plan(large, larger, Share())
        record(FOUR_TIMES, arguments.workers, lambda: run_pairs(large, larger, Share()), 4 * len(images))

    ours, plain = results[OURS], results["plain loop: open, resize, write"]
    ratio = ours["images_per_s"] / plain["images_per_s"]
    goals = {"images/s of pairs / plain loop, 2 cores": at_least(ratio, GOAL)}
    print(f"pairs / plain loop: {goals['images/s of pairs / plain loop, 2 cores']}; {conditions()}")
    figures = {name: {key: round(value, 2) for key, value in row.items()} for name, row in results.items()}
    print_goals("pairs", goals, images=len(images), workers=arguments.workers, results=figures)


def write_source(folder: Path, images: list[bytes], captions: list[str]) -> None:
    """Write the images as one tar, in img2dataset's layout."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
            for suffix, data in (("jpg", image), ("json", json.dumps({"caption": caption}).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
