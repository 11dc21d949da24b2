"""Requests of `plan`, `pairs` and a family, counted by an S3 server on this machine, beside their formulas.

F source files, P parts, T tasks, one after another. Source files are local, so no request reads an image: how
many of these there are depends on the source.
"""

import contextlib
import io
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.prepare_data import config_of
from data_prep.config import BucketConfig, DatasetConfig
from data_prep.dataset.parts import read_plan, register_family
from data_prep.dataset.schema import Family
from data_prep.families.encode import encode_family
from data_prep.pairs.pairs import Pair, run_pairs
from data_prep.plan.plan import run_plan
from data_prep.store.store import Store, open_store
from model.common.share import Share


class Layout(NamedTuple):
    """Size of a dataset."""

    files: int
    file_rows: int
    part_rows: int


LAYOUTS = (Layout(16, 30, 16), Layout(16, 30, 4), Layout(48, 10, 4))
"""The first two differ only in the number of parts, so what a part costs follows from them."""
TASKS = (1, 4, 16)
BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
FORMULAS = {
    "plan": ("4 F + P / 16 + 16 T + 50", lambda f, p, t: 4 * f + p // 16 + 16 * t + 50),
    "pairs": ("9 P + T (LIST + 8)", lambda f, p, t: 9 * p + t * (1 + p // 1000 + 8)),
    "family": ("9 P + T (LIST + 8)", lambda f, p, t: 9 * p + t * (1 + p // 1000 + 8)),
}
"""Step -> its formula. Of `plan`: with one group of source files; a scan table is written once and read
twice, and a table of dropped rows is written once."""


class Counted(NamedTuple):
    """Requests of all tasks of a step."""

    step: str
    files: int
    parts: int
    tasks: int
    requests: dict[str, int]

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    @property
    def lists(self) -> int:
        """LISTs."""
        return self.requests.get("LIST", 0)


@contextlib.contextmanager
def counting_server() -> Iterator[Counter[str]]:
    """Run an S3 server with an empty bucket; yield the counts of requests by kind."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    requests: Counter[str] = Counter()
    app = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        listing = "list-type=2" in environ["QUERY_STRING"]
        with lock:
            requests["LIST" if listing else environ["REQUEST_METHOD"]] += 1
        return app(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, counting, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "S3_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, S3_ENDPOINT_URL=url)
    try:
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        requests.clear()
        yield requests
    finally:
        server.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def write_tars(folder: Path, files: int, rows: int) -> None:
    """Write tars of images, no two of them equal."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(files):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(rows):
                image = io.BytesIO()
                pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(image, "JPEG")
                for name, data in (("jpg", image.getvalue()), ("txt", f"caption {number} {row}".encode())):
                    member = tarfile.TarInfo(f"{row:05d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def encode(pairs: list[Pair]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return latents of four bytes per pair."""
    return [{"id": pair.id, "mean": b"mean", "std": b"std."} for pair in pairs], {"rows": len(pairs)}


def steps_of(config: DatasetConfig, dataset: Store) -> dict[str, Callable[[Share], object]]:
    """Return the steps to count, in order."""
    family = Family("latents", "latents", {"model": "a"}, {"channels": 1})

    def run_family(share: Share) -> None:
        encode_family(dataset, register_family(dataset, family, None), encode, share)

    return {
        "plan": lambda share: run_plan(config, dataset, share),
        "pairs": lambda share: run_pairs(config, dataset, share),
        "family": run_family,
    }


def count_requests(
    folder: Path, layouts: Sequence[Layout] = LAYOUTS, tasks: Sequence[int] = TASKS
) -> list[Counted]:
    """Run all steps for every size and every number of tasks, each in a store of its own."""
    found: list[Counted] = []
    silent = io.StringIO()
    with (
        counting_server() as requests,
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        for number, layout in enumerate(layouts):
            source = folder / f"in-{number}"
            write_tars(source, layout.files, layout.file_rows)
            for count in tasks:
                config = config_of(source, near=False)
                config.store, config.part_rows = f"s3://{BUCKET}/{number}-{count}", layout.part_rows
                config.buckets = BucketConfig(resolution=64, max_aspect=1.0, step=64)
                dataset = open_store(config.store, create=True).sub(config.name)
                for step, run in steps_of(config, dataset).items():
                    requests.clear()
                    for index in range(count):
                        run(Share(index, count))
                    counts = dict(requests)
                    parts = len(read_plan(dataset).parts)
                    found.append(Counted(step, layout.files, parts, count, counts))
    return found


def requests_per_part(found: Sequence[Counted], step: str) -> float:
    """Return the requests that a further part adds, without LISTs: the most of all numbers of tasks."""
    most = 0.0
    own = [entry for entry in found if entry.step == step]
    for first in own:
        for second in own:
            if (first.files, first.tasks) == (second.files, second.tasks) and first.parts < second.parts:
                added = (second.total - second.lists) - (first.total - first.lists)
                most = max(most, added / (second.parts - first.parts))
    return most


def requests_table(found: Sequence[Counted]) -> list[str]:
    """Return the lines of the table of counted requests."""
    lines = ["| step | F | P | T | at most | | counted | of these LISTs | others per part |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for entry in found:
        formula, bound = FORMULAS[entry.step]
        value = bound(entry.files, entry.parts, entry.tasks)
        per_part = (entry.total - entry.lists) / entry.parts
        lines.append(
            f"| {entry.step} | {entry.files} | {entry.parts} | {entry.tasks} | {formula} | {value:,} "
            f"| {entry.total:,} | {entry.lists} | {per_part:.2f} |"
        )
    return lines
