"""Speed of the loader and of other readers on the same samples, and the time that a step waits for data.

Two text families, 4,096 wide (int8), and latents of 512x512 pixels. Ours is measured up to the block of
memory that goes to the device, and also with unpacking on a CPU, where the trainer samples the noise. The
others are: (a) StreamingDataset over the same bytes and nothing else, (b) tensors saved by torch in
WebDataset tars (dequantized, bf16), (c) MDS of fp16 states padded to a fixed length, as micro_diffusion
stores them; and reading our files raw. All files are in the page cache, and each reader gives batches of one
size. The wait is that of the demo's stage, trained on two processes on a dataset of the demo's shape. `python
-m benchmarks.loader [--samples 384]`
"""

import argparse
import io
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.reporting import at_least, at_most, conditions, print_goals
from data_prep.dataset.mds import write_mds
from data_prep.dataset.parts import commit_part, register_family
from data_prep.dataset.schema import PAIRS, Family, Manifest, Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.store.store import open_store
from pipeline.data.batch import tensors_in
from pipeline.data.loader import TrainingData
from pipeline.runtime.run_log import read_reports
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import resolve

WIDTH, TOKENS, PADDED = 4096, (20, 140), 256
CHANNELS, SIDE = 16, 64
PART_ROWS, BATCH = 64, 8
Figures = dict[str, float]
Collate = Callable[..., dict[str, Tensor]]
RESULTS = Path(__file__).parent / "results" / "loader.md"

DEMO_WIDTHS, DEMO_TOKENS, DEMO_ROWS, DEMO_STEPS = {"smollm2": 576, "gemma": 640}, (4, 16), 1856, 60


def latents(channels: int) -> Family:
    """Return a latents family."""
    info = {"channels": channels, "downsampling": 8, "scaling_factor": 1.0, "shift_factor": 0.0}
    return Family("latents", "latents", {"model": "none"}, info)


def texts(widths: dict[str, int]) -> list[Family]:
    """Return text families by name and width."""
    info = {"prefix_tokens": 20, "quantisation": "int8"}
    return [Family(name, "text", {"llm": name}, {"width": width, **info}) for name, width in widths.items()]


TEXTS = texts({"llm_a": WIDTH, "llm_b": WIDTH})


def lengths_of(id: int, tokens: tuple[int, int] = TOKENS) -> np.ndarray:
    """Number of tokens of a sample's caption in each of two text families."""
    low, high = tokens
    return np.random.default_rng(id).integers(low, high, 2)


def rows_of(
    family: Family, number: int, ids: list[int], side: int, tokens: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Random numbers in the shape of a family's rows."""
    rng = np.random.default_rng(ids[0])
    for id in ids:
        if family.kind == "latents":
            mean = torch.from_numpy(
                rng.standard_normal(family.info["channels"] * side**2, np.float32)
            ).bfloat16()
            yield {"id": id, "mean": mean.view(torch.uint8).numpy().tobytes(), "std": bytes(2 * len(mean))}
        else:
            count = int(lengths_of(id, tokens)[number])
            scales, values = np.full(count, 0.01, "<f4").tobytes(), rng.bytes(count * family.info["width"])
            yield {
                "id": id,
                "kinds": b"\0",
                "tokens": np.array([count], "<i4").tobytes(),
                "values": values,
                "scales": scales,
            }


def write_ours(
    uri: str,
    samples: int,
    folder: Path,
    side: int = SIDE,
    widths: dict[str, int] | None = None,
    tokens: tuple[int, int] = TOKENS,
) -> None:
    """Write a snapshot of `samples` samples in one bucket, with latents of `side` x `side`."""
    dataset = open_store(uri, create=True).sub("ds")
    bucket = f"{8 * side}x{8 * side}"
    parts = [Part(bucket, number) for number in range(samples // PART_ROWS)]
    dataset.put_new(Manifest.KEY, Manifest("ds", ["original"], {bucket: [PART_ROWS] * len(parts)}).to_json())
    families = [register_family(dataset, latents(CHANNELS), None)]

    for text in texts(widths) if widths else TEXTS:
        constants = {name: torch.zeros(20, text.info["width"]) for name in ("prefix_states", "null_states")}
        constants |= {"mean": torch.zeros(text.info["width"]), "spread": torch.ones(text.info["width"])}
        families.append(register_family(dataset, text, constants))

    path = folder / "shard.00000.mds"
    for part in parts:
        ids = list(range(part.number * PART_ROWS, (part.number + 1) * PART_ROWS))
        path.write_bytes(b"none")
        commit_part(dataset, PAIRS, part, {"pairs.tar": path}, ids, {})

        for number, family in enumerate(families):
            write_mds(path, family.columns, rows_of(family, number - 1, ids, side, tokens))
            commit_part(dataset, family.name, part, {"shard.00000.mds": path}, ids, {}, family.hash)

    path.unlink()
    take_snapshot(dataset)


def write_streaming(folder: Path, samples: int, padded: bool) -> None:
    """Write (a), all columns of a sample as `bytes`, or (c), fp16 states of fixed length and fp16 latents."""
    from streaming import MDSWriter

    names = ["mean", "std", *(f"{part}_{text.name}" for text in TEXTS for part in ("values", "scales"))]

    if padded:
        names = ["latents", *(text.name for text in TEXTS)]
    with MDSWriter(out=str(folder), columns=dict.fromkeys(names, "bytes"), size_limit=1 << 26) as writer:
        for id in range(samples):
            rng = np.random.default_rng(id)
            if padded:
                row = {text.name: rng.bytes(2 * PADDED * WIDTH) for text in TEXTS}
                writer.write({"latents": rng.bytes(2 * CHANNELS * SIDE**2), **row})
            else:
                row = {"mean": rng.bytes(2 * CHANNELS * SIDE**2), "std": bytes(2 * CHANNELS * SIDE**2)}
                for text, tokens in zip(TEXTS, lengths_of(id), strict=True):
                    row[f"values_{text.name}"] = rng.bytes(int(tokens) * WIDTH)
                    row[f"scales_{text.name}"] = rng.bytes(int(tokens) * 4)

                writer.write(row)


def write_tars(folder: Path, samples: int) -> None:
    """Write (b): one `.pth` per sample, a dict of tensors: states and moments in bf16, ragged."""
    folder.mkdir()
    for shard in range(0, samples, PART_ROWS):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for id in range(shard, min(shard + PART_ROWS, samples)):
                tensors = {
                    name: torch.zeros(CHANNELS, SIDE, SIDE, dtype=torch.bfloat16) for name in ("mean", "std")
                }
                for text, tokens in zip(TEXTS, lengths_of(id), strict=True):
                    tensors[text.name] = torch.randn(int(tokens), WIDTH).bfloat16()

                data = io.BytesIO()
                torch.save(tensors, data)
                member = tarfile.TarInfo(f"{id:08d}.pth")
                member.size = len(data.getvalue())
                tar.addfile(member, io.BytesIO(data.getvalue()))


def size_of(item: object) -> int:
    """Bytes of all tensors in a batch."""
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(map(size_of, item.values()))
    return sum(map(size_of, item)) if isinstance(item, list | tuple) else 0


def timed(batches: Iterator[tuple[int, int]], steps: int, warm: int) -> Figures:
    """Return samples/s and GB/s over `steps` batches after `warm` ones.

    Args:
        batches: samples and bytes of each batch that was read.
        steps: batches that count.
        warm: batches before those.
    """
    for _ in range(warm):
        next(batches)

    begun, samples, size = time.perf_counter(), 0, 0
    for _ in range(steps):
        count, read = next(batches)
        samples, size = samples + count, size + read

    seconds = time.perf_counter() - begun
    return {"samples_per_second": samples / seconds, "gb_per_second": size / seconds / 1e9}


def stage_of(uri: str, cache: Path, workers: int) -> StageConfig:
    """A stage that reads a snapshot of `write_ours`."""
    stage = StageConfig(name="loader", global_batch=BATCH, samples=10**9)
    stage.data.store, stage.data.dataset = uri, "ds"
    stage.data.cache, stage.data.workers = str(cache), workers
    stage.data.caption_drop = 0.0
    stage.fusion.families = [text.name for text in TEXTS]
    return stage


def ours(uri: str, cache: Path, workers: int, steps: int, warm: int, unpack: bool = False) -> Figures:
    """Our loader; bytes are those read from files, not the noise that unpacking adds."""
    data = TrainingData(*resolve(stage_of(uri, cache, workers)), 0, 1, torch.device("cpu"))

    def batches() -> Iterator[tuple[int, int]]:
        for item in data.packed():
            if unpack:
                item.unpack(data.device)

            tensors = tensors_in(item.memory, item.layout)
            yield len(tensors["ids"]), size_of(tensors)

    result = timed(batches(), steps, warm)
    data.close()
    return result


def data_wait(folder: Path) -> float:
    """Share of a step that the demo's stage waits for data, in a training run on two processes."""
    write_ours(str(folder / "demo"), DEMO_ROWS, folder, 8, DEMO_WIDTHS, DEMO_TOKENS)
    settings = [
        f"data.store={folder / 'demo'}",
        "data.dataset=ds",
        f"runs={folder}",
        f"samples={64 * DEMO_STEPS}",
    ]

    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pipeline.train",
    ]

    subprocess.run(
        [*launch, "demo", *settings], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return float(np.mean([report["data_wait_share"] for report in read_reports(folder / "demo")[1:]]))


def ragged(samples: list[dict[str, bytes]]) -> dict[str, Tensor]:
    """Collate `bytes` columns with as little work as possible: one tensor per column."""
    names = [name for name, value in samples[0].items() if isinstance(value, bytes)]
    tensors = {}
    for name in names:
        column = bytearray(b"".join(sample[name] for sample in samples))
        tensors[name] = torch.frombuffer(column, dtype=torch.uint8)
    return tensors


def fixed(samples: list[dict[str, bytes]]) -> dict[str, Tensor]:
    """Collate padded fp16 states as micro_diffusion does: one tensor per sample, stacked."""
    tensors = {}
    for name in samples[0]:
        shape = (CHANNELS, SIDE, SIDE) if name == "latents" else (PADDED, WIDTH)
        column = [np.frombuffer(sample[name], np.float16).reshape(shape).copy() for sample in samples]
        tensors[name] = torch.stack([torch.from_numpy(array) for array in column])
    return tensors


def padded_states(samples: list[tuple[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Collate tensors of a tar as a trainer needs them: states padded to the longest."""
    columns = {name: [sample[0][name] for sample in samples] for name in samples[0][0]}
    return {
        name: torch.stack(column)
        if name in ("mean", "std")
        else torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
        for name, column in columns.items()
    }


def streaming(folder: Path, collate: Collate, workers: int, steps: int, warm: int) -> Figures:
    """StreamingDataset over a local folder, shuffled."""
    from streaming import StreamingDataset

    shuffle = {"shuffle": True, "shuffle_block_size": 512, "num_canonical_nodes": 1}
    dataset = StreamingDataset(local=str(folder), batch_size=BATCH, **shuffle)
    processes = {"num_workers": workers, "prefetch_factor": 2, "persistent_workers": True}

    return timed(
        _endless(DataLoader(dataset, batch_size=BATCH, collate_fn=collate, **processes)), steps, warm
    )


def streaming_ours(uri: str, cache: Path, workers: int, steps: int, warm: int) -> Figures:
    """Our snapshot as a StreamingDataset."""
    from pipeline.data.streaming import SnapshotLoader, StreamingSnapshot

    processes = {"num_workers": workers, "prefetch_factor": 2, "persistent_workers": True}
    loader = SnapshotLoader(StreamingSnapshot(stage_of(uri, cache, workers)), collate_fn=ragged, **processes)
    return timed(_endless(loader), steps, warm)


def webdataset(folder: Path, workers: int, steps: int, warm: int) -> Figures:
    """WebDataset over local tars, with a shuffle buffer."""
    from webdataset.compat import WebDataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset: Any = (
        WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(32)
        .map(_load)
        .to_tuple("pth")
    )

    loader = DataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=padded_states, prefetch_factor=2
    )
    return timed(_endless(loader), steps, warm)


def _load(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "pth": torch.load(io.BytesIO(sample["pth"]), weights_only=True)}


def _endless(loader: DataLoader) -> Iterator[tuple[int, int]]:
    while True:
        for batch in loader:
            first = next(iter(batch.values()))
            count = BATCH if first.dtype == torch.uint8 else len(first)
            yield count, size_of(batch)


def raw(folder: Path) -> float:
    """Reading our files from the page cache, one after another, into one buffer."""
    paths = sorted(Path(folder).rglob("*.mds"))
    buffer = bytearray(max(path.stat().st_size for path in paths))
    best = 0.0

    for _ in range(3):
        begun, size = time.perf_counter(), 0
        for path in paths:
            with path.open("rb", buffering=0) as file:
                size += file.readinto(memoryview(buffer))

        best = max(best, size / (time.perf_counter() - begun) / 1e9)

    return best


@contextmanager
def s3_store() -> Iterator[str]:
    """An S3 API of moto on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys | {"S3_ENDPOINT_URL": f"http://{host}:{port}"})
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="loader")

    try:
        yield "s3://loader/store"
    finally:
        server.stop()


def measure(samples: int, folder: Path, worker_counts: list[int]) -> tuple[dict[str, Figures], int]:
    """Measure all readers: name -> figures; and the number of workers of (b) and (c)."""
    steps, warm = max(samples // BATCH, 24), 8
    results: dict[str, Figures] = {}
    write_ours(str(folder / "ours"), samples, folder)
    results["raw files"] = {"gb_per_second": raw(folder / "ours")}
    write_streaming(folder / "a", samples, padded=False)

    for workers in worker_counts:
        results[f"ours, local, {workers} workers"] = ours(
            str(folder / "ours"), folder / "cache", workers, steps, warm
        )
        results[f"ours unpacked on a CPU, local, {workers} workers"] = ours(
            str(folder / "ours"), folder / "cache", workers, steps // 2, 4, unpack=True
        )
        results[f"(a) StreamingDataset, {workers} workers"] = streaming(
            folder / "a", ragged, workers, steps, warm
        )
        results[f"ours as a StreamingDataset, {workers} workers"] = streaming_ours(
            str(folder / "ours"), folder / "cache", workers, steps, warm
        )

    workers = min(2, worker_counts[-1])
    write_tars(folder / "b", samples // 2)
    results[f"(b) torch in WebDataset, {workers} workers"] = webdataset(
        folder / "b", workers, steps // 2, warm
    )
    write_streaming(folder / "c", samples // 3, padded=True)
    results[f"(c) fp16 padded MDS, {workers} workers"] = streaming(
        folder / "c", fixed, workers, steps // 3, 4
    )

    with s3_store() as uri:
        write_ours(uri, samples // 3, folder)
        # Counts from the first batch on, downloads included; moto serves with the cores that the loader has.
        results[f"ours, moto S3, empty cache, {workers} workers"] = ours(
            uri, folder / "cache", workers, samples // 3 // BATCH, 1
        )
        results[f"ours, moto S3, full cache, {workers} workers"] = ours(
            uri, folder / "cache", workers, steps, warm
        )

    return results, workers


def main() -> None:
    """Measure, write the table, print one line of JSON at the end."""
    parser = argparse.ArgumentParser(description="Samples/s and GB/s of the loader, against what others do")
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        results, workers = measure(
            max(3, arguments.samples // PART_ROWS) * PART_ROWS, Path(folder), arguments.workers
        )
        wait = data_wait(Path(folder))

    speeds = {name: figures.get("samples_per_second", 0.0) for name, figures in results.items()}
    mine = speeds[f"ours, local, {workers} workers"]
    counts = arguments.workers
    rate = {name: figures["gb_per_second"] for name, figures in results.items()}

    def against_streaming(name: str) -> float:
        ratios = [
            rate[f"{name}, {count} workers"] / rate[f"(a) StreamingDataset, {count} workers"]
            for count in counts
        ]
        return float(np.median(ratios))

    against_a = against_streaming("ours, local")
    streaming_against_a = against_streaming("ours as a StreamingDataset")

    against_b, against_c = (
        mine / speeds[f"{name}, {workers} workers"]
        for name in ("(b) torch in WebDataset", "(c) fp16 padded MDS")
    )
    goals = {
        "bytes/s against (a)": at_least(against_a, 0.95),
        "bytes/s as a StreamingDataset against (a)": at_least(streaming_against_a, 0.95),
        "samples/s against (b)": at_least(against_b, 2),
        "samples/s against (c)": at_least(against_c, 3),
        "share of a step of the demo's stage that waits for data": at_most(wait, 0.01),
    }

    lines = ["| reader | samples/s | GB/s |", "|---|---|---|"]
    lines += [
        f"| {name} | {speeds[name]:.0f} | {figures['gb_per_second']:.2f} |"
        for name, figures in results.items()
    ]
    lines += [
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {goal} |" for name, goal in goals.items()),
    ]

    table = "\n".join(lines)
    RESULTS.parent.mkdir(exist_ok=True)
    command = f"`python -m benchmarks.loader --samples {arguments.samples}`"
    text = f"# Loader\n\n{command}; {conditions()}; batches of {BATCH}.\n\n{table}\n"
    RESULTS.write_text(text)
    print(text)
    print_goals("loader", goals, results=results)


if __name__ == "__main__":
    main()
