"""A remote store that misbehaves: right data or a clear error on every rank, with any number of loader processes."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from pipeline.loader import TrainingData
from tests.pipeline import fake_snapshot as fake
from tests.s3 import Fault

BUCKETS = {"64x64": [9, 8], "48x80": [7]}
CPU = torch.device("cpu")
STEPS = 8


@pytest.fixture
def remote(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "3")
    fake.make(s3, BUCKETS, tmp_path)
    return s3


def ids(stage, rank=0, world=1, steps=STEPS):
    data = TrainingData(stage, rank, world, CPU)
    try:
        return [batch.ids.tolist() for batch, _ in itertools.islice(data.batches(), steps)]
    finally:
        data.close()


@pytest.fixture
def expected(tmp_path):
    fake.make(tmp_path / "local", BUCKETS, tmp_path)
    return ids(fake.stage(tmp_path / "local", tmp_path / "local-cache"))


def shards(cache):
    return sorted(path for path in Path(cache).rglob("*.mds"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_store_gives_the_same_batches(remote, expected, tmp_path, workers):
    stage = fake.stage(remote, tmp_path / "cache", workers=workers)
    assert ids(stage) == expected
    assert len(shards(tmp_path / "cache")) == 9  # 3 parts of 3 families, each once
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_both_ranks_of_a_node_share_one_download(remote, proxy, expected, tmp_path):
    stage = fake.stage(remote, tmp_path / "cache")
    halves = [ids(stage, rank, 2) for rank in range(2)]
    assert [left + right for left, right in zip(*halves, strict=True)] == expected
    payloads = [path for method, path, _ in proxy.requests if method == "GET" and ".mds" in path]
    assert len(payloads) == len(set(payloads)) == 9


@pytest.mark.parametrize(("do", "workers"), [("503", 0), ("reset", 0), ("short", 1), ("flip", 2), ("stall", 0)])
def test_faults_that_pass_are_not_noticed(remote, proxy, expected, tmp_path, do, workers):
    proxy.faults.append(Fault(do, method="GET", path=r"\.mds", times=2))
    assert ids(fake.stage(remote, tmp_path / "cache", workers=workers)) == expected
    assert any(fault == do for _, _, fault in proxy.requests)


@pytest.mark.parametrize(("do", "workers"), [("503", 2), ("flip", 0)])
def test_faults_that_stay_are_an_error_that_names_the_shard_on_each_rank_and_restart(remote, proxy, tmp_path, do, workers):
    proxy.faults.append(Fault(do, method="GET", path=r"families/wide/.*\.mds"))
    stage = fake.stage(remote, tmp_path / "cache", workers=workers)
    for rank in range(2):  # the second one finds what the first one left
        began = time.monotonic()
        with pytest.raises(UserError, match=r"families/wide/.*shard\.00000\.mds") as caught:
            ids(stage, rank, 2)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 40
    assert not [path for path in shards(tmp_path / "cache") if "wide" in str(path)], "a bad file never gets its name"


def test_a_missing_shard_is_named(remote, tmp_path):
    from data_prep.store import open_store

    dataset = open_store(remote).sub("ds")
    (key,) = (key for key in dataset.list("families/small/48x80/"))
    dataset.delete(key)
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"{key}: is missing"):
            ids(fake.stage(remote, tmp_path / "cache", workers=workers))


def test_a_damaged_file_in_the_cache_is_fetched_anew(remote, expected, tmp_path):
    stage = fake.stage(remote, tmp_path / "cache")
    ids(stage)
    for path, size in zip(shards(tmp_path / "cache"), (0, 10, None, 0, 10, None, 0, 10, None), strict=True):
        data = path.read_bytes()
        path.write_bytes(data[:size] if size is not None else data[:-1] + bytes([data[-1] ^ 1]))
    assert ids(stage) == expected


def test_a_small_cache_evicts_what_was_used_longest_ago(remote, expected, tmp_path):
    stage = fake.stage(remote, tmp_path / "free")
    ids(stage)
    whole = [path.stat().st_size for path in shards(tmp_path / "free")]
    limit = sum(whole) - max(whole)
    small = fake.stage(remote, tmp_path / "small", cache_limit_gb=limit / 1e9)
    for _ in range(2):
        assert ids(small) == expected
        assert sum(path.stat().st_size for path in shards(tmp_path / "small")) <= limit


def test_a_full_disk_is_an_error_that_names_the_path(remote, full_disk, tmp_path):
    stage = fake.stage(remote, tmp_path / "cache")
    ids(stage, steps=0)
    batches = TrainingData(stage, 0, 1, CPU).batches()
    with full_disk(600), pytest.raises(UserError, match=r"cache/.*\.mds"):
        next(batches)


def test_another_snapshot_has_its_own_cache(remote, tmp_path):
    ids(fake.stage(remote, tmp_path / "cache"))
    first = {path.parent for path in (tmp_path / "cache").glob("*/latents")}
    other = remote + "/other"
    fake.make(other, {"64x64": [8]}, tmp_path)
    ids(fake.stage(other, tmp_path / "cache"), steps=2)
    assert len(set((tmp_path / "cache").glob("*/latents"))) == len(first) + 1


PROGRAM = """
import itertools, sys, torch
from pipeline.loader import TrainingData
from tests.pipeline import fake_snapshot as fake

if __name__ == "__main__":
    store, cache = sys.argv[1:3]
    steps, workers, rank, world = map(int, sys.argv[3:])
    data = TrainingData(fake.stage(store, cache, workers=workers), rank, world, torch.device("cpu"))
    for batch, _ in itertools.islice(data.batches(), steps):
        print(batch.ids.tolist(), flush=True)
    print("done", flush=True)
    if steps > 100:
        data.close()
"""


@pytest.fixture
def start(remote, tmp_path):
    """Start a program that prints its rank's batches."""
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def started(steps, workers=1, rank=0, world=1):
        numbers = map(str, (steps, workers, rank, world))
        command = [sys.executable, str(tmp_path / "program.py"), remote, str(tmp_path / "cache"), *numbers]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)

    return started


def test_two_live_ranks_get_right_data_or_both_an_error(remote, proxy, start, expected):
    proxy.faults.append(Fault("reset", method="GET", path=r"\.mds", times=2))
    ranks = [start(STEPS, 0, rank, 2) for rank in range(2)]
    halves = [[json.loads(line) for line in rank.communicate(timeout=120)[0].split("\n")[:STEPS]] for rank in ranks]
    assert [left + right for left, right in zip(*halves, strict=True)] == expected
    shutil.rmtree(next(Path(ranks[0].args[3]).glob("*/wide")))
    proxy.faults[:] = [Fault("503", method="GET", path=r"families/wide/.*\.mds")]
    for rank in [start(STEPS, 0, rank, 2) for rank in range(2)]:
        printed, error = rank.communicate(timeout=120)
        assert rank.returncode
        assert "done" not in printed
        assert re.search(r"families/wide/.*shard\.00000\.mds", error)


def test_killed_and_restarted_again_and_again(remote, expected, tmp_path):
    """SIGKILL at any moment leaves nothing behind that stops the next start."""
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    cache = tmp_path / "cache"

    def start(steps):
        command = [sys.executable, str(tmp_path / "program.py"), remote, str(cache), str(steps), "1", "0", "1"]
        return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)

    for delay in (0.0, 0.1):
        process = start(100000)
        line = process.stdout.readline()
        assert line.strip() == str(expected[0])
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
        process.stdout.close()
        shutil.rmtree(next(cache.glob("*/wide")))  # some of it is fetched again, now and then
    process = start(STEPS)
    assert process.communicate(timeout=60)[0].split("\n")[:STEPS] == [str(batch) for batch in expected]
    assert process.returncode == 0
