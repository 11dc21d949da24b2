"""A remote store that misbehaves, and jobs that are killed: right data or a clear error on every rank."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.store.store import StoreError, hash_file, open_store
from pipeline.data import shard_cache
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import open_data
from tests.helpers.loader_process import (
    READERS,
    Job,
    fake_rows,
    line,
    lines,
    processes_with,
    shared_memory,
    wait_until,
)
from tests.helpers.s3 import BUCKET, CREDENTIALS, Fault

ROOT = Path(__file__).parents[3]
BUCKETS = {"64x64": [9, 8], "48x80": [7]}
FILES = 9  # 3 parts of 3 families
STEPS = 8  # an epoch has 5
ANY, WIDE, ONE = r"\.mds", r"families/wide/.*\.mds", r"families/small/48x80/.*\.mds"


@pytest.fixture(scope="module")
def stored(s3_url, tmp_path_factory):
    """The dataset in a bucket, to be read only."""
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**CREDENTIALS, "S3_ENDPOINT_URL": s3_url}.items():
            environment.setenv(name, value)
        fake.make(uri, BUCKETS, tmp_path_factory.mktemp("stored"))
    return uri


@pytest.fixture
def remote(s3, stored, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "3")
    return stored


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return fake.make_local(tmp_path_factory.mktemp("snapshot"), BUCKETS)


@pytest.fixture(scope="module")
def expected(local, tmp_path_factory):
    """Batches that each rank of each world must read."""
    stage = fake.stage(local, tmp_path_factory.mktemp("cache"))
    return {(rank, world): lines(stage, STEPS, rank, world) for world in (1, 2) for rank in range(world)}


@pytest.fixture(scope="module")
def expected_rows(local, tmp_path_factory):
    """The same as rows of mosaicml-streaming."""
    stage = fake.stage(local, tmp_path_factory.mktemp("cache"))
    return {
        (rank, world): lines(stage, STEPS, rank, world, fake_rows)
        for world in (1, 2)
        for rank in range(world)
    }


def shards(cache):
    return sorted(Path(cache).rglob("*.mds"))


def unfinished(cache):
    return [path for path in Path(cache).rglob("*") if path.suffix in (".part", ".reserved")]


def payloads(proxy):
    """Keys of the payload files that were asked for."""
    return [path for method, path, _ in proxy.requests if method == "GET" and ".mds" in path]


# -- the table: research on what breaks streaming readers, row by row ------------------------------


@dataclass
class Case:
    """A job on the remote store."""

    remote: str
    proxy: object
    folder: Path
    reader: str
    workers: int
    ranks: int

    @property
    def cache(self):
        return self.folder / "cache"

    def job(self, steps=STEPS, **change):
        settings = {"cache": str(self.cache), "workers": self.workers}
        return Job(self.folder, self.remote, settings, steps, self.ranks, reader=self.reader, **change)

    def fill_cache(self):
        lines(fake.stage(self.remote, self.cache), STEPS)

    def replace(self, change):
        """Do `change` to the bytes of one object in the bucket; None deletes it."""
        dataset = open_store(self.remote).sub("ds")
        (key,) = dataset.list("families/small/48x80/")
        data = change(dataset.read(key))
        dataset.delete(key)
        if data is not None:
            dataset.put(key, data)


def damage_object(case):
    case.replace(lambda data: data[:-1] + bytes([data[-1] ^ 1]))


def cut_object(case):
    case.replace(lambda data: data[:-1])


def lose_object(case):
    case.replace(lambda data: None)


def damage_cache(case):
    """Each file there is emptied, cut, changed or lost."""
    case.fill_cache()
    for path, how in zip(shards(case.cache), itertools.cycle(range(4)), strict=False):
        data = path.read_bytes()
        path.write_bytes([b"", data[:10], data[:-1] + bytes([data[-1] ^ 1]), b""][how])
        if how == 3:
            path.unlink()


def make_again(case):
    """Another dataset lay at the same place when the cache was filled."""
    store = open_store(case.remote)
    for buckets in ({"64x64": [6], "48x80": [9, 8]}, BUCKETS):
        for key in list(store.list("")):
            store.delete(key)
        fake.make(case.remote, buckets, case.folder)
        if buckets != BUCKETS:
            case.fill_cache()


def kill(case):
    """All ranks, while they fetch."""
    job = case.job(steps=10**6)
    wait_until(lambda: len(payloads(case.proxy)) > FILES // 2, 60)
    job.kill()
    case.proxy.requests.clear()


@dataclass
class Row:
    """A fault, and what it must come to."""

    faults: list = ()
    """(what, path, how often; None = always) of the proxy."""
    says: str | None = ""
    """Pattern of every rank's error; empty = right data on every rank, None = either."""
    before: Callable = lambda case: None
    again: bool = False
    """True if a restart must end in the same way."""
    largest_file: int | None = None

    @property
    def writes(self):
        """True if `before` changes the store."""
        return self.before in (damage_object, cut_object, lose_object, make_again)


TABLE = {
    "503 twice": Row([("503", ANY, 2)]),
    "503 twice, index and records": Row([("503", r"/snapshots/|constants", 4)]),
    "503 always": Row([("503", WIDE, None)], r"families/wide/\S*\.mds: 503 SlowDown"),
    "no access": Row(
        [("403", WIDE, None)], r"families/wide/\S*\.mds: 403 AccessDenied: check the credentials"
    ),
    "reset twice": Row([("reset", ANY, 2)]),
    "reset always": Row([("reset", WIDE, None)], None),
    "stall once": Row([("stall", ANY, 1)]),
    "stall always": Row([("stall", WIDE, None)], None),
    "short body twice": Row([("short", ANY, 2)]),
    "short body always": Row([("short", WIDE, None)], None),
    "flipped byte twice": Row([("flip", ANY, 2)]),
    "flipped byte always": Row(
        [("flip", WIDE, None)], r"families/wide/\S*\.mds: .* the object is damaged", again=True
    ),
    "flipped byte in a range": Row([("reset", ONE, 1), ("flip", ONE, 1)]),
    "damaged object": Row(
        [], r"families/small/48x80/\S*\.mds: .* the object is damaged", damage_object, again=True
    ),
    "cut object": Row([], r"families/small/48x80/\S*\.mds: .* the object is damaged", cut_object, again=True),
    "missing object": Row([], r"families/small/48x80/\S*\.mds: is missing", lose_object, again=True),
    "full disk": Row([], r"cache/\S*\.mds: .*free space", largest_file=4300),
    "damaged cache": Row([], before=damage_cache),
    "dataset made again": Row([], before=make_again),
    "killed": Row([], before=kill),
}
BY_DEFAULT = {
    ("loader", "503 always", 2, 1),
    ("loader", "flipped byte in a range", 0, 2),
    ("loader", "full disk", 1, 1),
    ("loader", "missing object", 0, 2),
    ("loader", "damaged cache", 0, 1),
    ("streaming", "503 twice", 2, 1),
    ("streaming", "damaged object", 0, 2),
}
"""(reader, row, workers, ranks) of the quick suite; `pytest -m slow` runs all the others."""
COMBINATIONS = [
    pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow, id="{}-{}-{}-{}".format(*case))
    for case in itertools.product(READERS, TABLE, (0, 1, 2), (1, 2))
]


@pytest.mark.parametrize(("reader", "row", "workers", "ranks"), COMBINATIONS)
def test_right_data_or_a_clear_error_on_every_rank(
    s3, remote, local, proxy, expected, expected_rows, tmp_path, monkeypatch, reader, row, workers, ranks
):
    row, right_data = TABLE[row], {"loader": expected, "streaming": expected_rows}[reader]
    if row.says == "":  # a machine that is busy with other things takes its time
        monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "20")
    case = Case(s3 if row.writes else remote, proxy, tmp_path, reader, workers, ranks)
    if row.writes:
        fake.make(s3, BUCKETS, tmp_path)
    row.before(case)
    for _ in range(1 + row.again):
        proxy.faults[:] = [Fault(do, "GET", path, times) for do, path, times in row.faults]
        ended = case.job(largest_file=row.largest_file).end(60)
        assert len({code for code, _, _ in ended}) == 1, "all ranks end alike"
        for rank, (code, printed, error) in enumerate(ended):
            wanted = right_data[rank, ranks]
            assert printed == wanted[: len(printed)], "no wrong batch, not before an error either"
            assert code in ({0, 2} if row.says is None else {2} if row.says else {0}), error
            if code:
                printed_errors = [
                    text
                    for text in error.splitlines()
                    if re.search(row.says or r"families/wide/\S*\.mds: ", text)
                ]
                assert [
                    text for text in printed_errors if text.startswith(("error: ", f"rank {rank} ends: "))
                ], error
            else:
                assert printed == wanted
        assert all(fault.hits for fault in proxy.faults)
    right = {hash_file(path) for path in local.rglob("*.mds")}
    cached = {
        hash_file(path) for path in shards(case.cache / read_snapshot(open_store(case.remote).sub("ds")).id)
    }
    assert cached <= right, "no bad file gets its name"
    if code == 0:
        assert cached == right
        assert not unfinished(case.cache)


# -- several ranks and jobs on one cache -----------------------------------------------------------


@pytest.mark.parametrize(("workers", "world"), [(2, 1), (0, 2)])
def test_all_processes_of_a_node_share_one_download(remote, proxy, expected, tmp_path, workers, world):
    stage = fake.stage(remote, tmp_path / "cache", workers=workers)
    for rank in range(world):
        assert lines(stage, STEPS, rank, world) == expected[rank, world]
    assert len(payloads(proxy)) == len(set(payloads(proxy))) == len(shards(tmp_path / "cache")) == FILES


def test_who_waits_for_a_download_fails_with_it(remote, expected, tmp_path, monkeypatch):
    """Not after as many retries again; a process that asks later tries again."""
    stage = fake.stage(remote, tmp_path / "cache")
    data = open_data(stage)
    (files,) = data.dataset.shards.sources
    file, name = files.index.file("48x80", 0, "small")
    cache, waiting, tries = files.cache, threading.Event(), []
    locked, fetch = cache.locked, cache.dataset.fetch

    def failing(*arguments):
        tries.append(arguments)
        assert waiting.wait(30)
        raise StoreError(f"{file.key}: 503 SlowDown")

    def noted(*arguments):
        if tries:
            waiting.set()
        return locked(*arguments)

    monkeypatch.setattr(cache, "locked", noted)
    monkeypatch.setattr(cache.dataset, "fetch", failing)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, file, name, 60.0)
        wait_until(lambda: tries)
        second = pool.submit(cache.get, file, name, 60.0)
        for outcome in (first, second):
            with pytest.raises(StoreError, match=f"^{file.key}: 503 SlowDown$"):
                outcome.result()
    assert len(tries) == 1
    monkeypatch.setattr(cache.dataset, "fetch", fetch)
    assert cache.get(file, name, 60.0)
    assert lines(stage, STEPS) == expected[0, 1]
    assert not list((tmp_path / "cache").rglob("*.failed*"))
    data.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_workers_start_fifty_times_over_plain_http(remote, expected, tmp_path):
    """A connection that two processes share hands one the other's bytes."""
    for start in range(50):
        stage = fake.stage(remote, tmp_path / f"cache_{start}", workers=8)
        assert lines(stage, STEPS) == expected[0, 1]


def test_a_small_cache_evicts_what_was_used_longest_ago(remote, expected, tmp_path):
    lines(fake.stage(remote, tmp_path / "free"), STEPS)
    whole = [path.stat().st_size for path in shards(tmp_path / "free")]
    limit = sum(whole) - max(whole)
    small = fake.stage(remote, tmp_path / "small", cache_limit_gb=limit / 1e9)
    for _ in range(2):
        assert lines(small, STEPS) == expected[0, 1]
        assert sum(path.stat().st_size for path in shards(tmp_path / "small")) <= limit


def test_what_a_killed_download_had_reserved_is_free_again(remote, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shard_cache, "LOCKS", 1
    )  # all files share one lock, which tells nothing of the reservations
    stage = fake.stage(remote, tmp_path / "cache")
    lines(stage, STEPS)
    lost, other, *kept = shards(tmp_path / "cache")
    times = [path.stat().st_mtime_ns for path in kept]
    for path in (lost, other):
        path.unlink()
    data = open_data(stage)  # which cleans; so the reservations come after it
    for path in (lost, other.with_name("99999.mds")):
        path.with_name(f"{path.name}.reserved").write_text(str(10**15))
    assert [line(batch) for batch, _ in itertools.islice(data.batches(), STEPS)] == expected[0, 1]
    assert [path.stat().st_mtime_ns for path in kept] == times
    data.close()


@pytest.fixture
def temporaries():
    """Two folders for TMPDIR, with short paths: that of the socket in it may have 107 letters."""
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        yield one, other


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [1, 20])
def test_killed_and_restarted_unattended(remote, proxy, expected, temporaries, tmp_path, kills):
    """SIGKILL at any moment leaves no process and nothing that stops the next start or another job on the
    cache."""
    cache, moments = tmp_path / "cache", random.Random(kills)
    live = open_data(fake.stage(remote, cache))
    living = live.batches()

    def start(number, steps):
        mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporaries[number % 2], "MARK": mark}
        environment["LI_DIT_RETRY_SECONDS"] = (
            "30"  # faults here end by themselves; it must outlast a busy machine
        )
        settings = {"cache": str(cache), "workers": 1 + number % 2}
        command = [
            sys.executable,
            "-m",
            "tests.helpers.loader_process",
            json.dumps([remote, settings, steps, "loader"]),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return mark, subprocess.Popen(command, env=environment, text=True, **pipes)

    for number in range(kills):
        for folder in cache.glob("*/wide"):
            shutil.rmtree(folder)
        proxy.requests.clear()
        proxy.faults[:] = [Fault("stall", "GET", WIDE, times=2)]
        mark, process = start(number, 10**6)
        asked = moments.randrange(3)
        wait_until(
            lambda asked=asked, process=process: len(payloads(proxy)) > asked or process.poll() is not None,
            60,
        )
        assert process.poll() is None, process.communicate()[1]
        time.sleep(moments.random())
        shared = shared_memory(processes_with(mark))
        process.kill()
        process.communicate()
        wait_until(lambda mark=mark: not processes_with(mark), 10)
        wait_until(lambda shared=shared: not any(path.exists() for path in shared), 10)
        if number < STEPS:
            assert line(next(living)[0]) == expected[0, 1][number], "a live job goes on"
    _, process = start(kills, STEPS)
    printed, error = process.communicate(timeout=60)
    assert printed.splitlines() == expected[0, 1]
    assert process.returncode == 0
    assert "leaked" not in error
    assert len(shards(cache)) == FILES
    assert not unfinished(cache)
    live.close()
