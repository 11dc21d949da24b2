"""mosaicml-streaming reads a snapshot: the same batches as our own loader, whole files or an error, and
nothing left behind.

The faults of stores are in `test_loader_faults.py`, for both readers.
"""

import copy
import inspect
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import StreamingDataLoader, StreamingDataset

from data_prep.store.store import StoreError
from model.common.errors import UserError
from pipeline.data import streaming as streaming_snapshot
from pipeline.data.streaming import StreamingSnapshot
from pipeline.stage.config import DatasetShare
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import open_data
from tests.helpers.loader_process import (
    READERS,
    Job,
    fake_row,
    fake_rows,
    lines,
    processes_with,
    shared_memory,
    streaming_line,
    wait_until,
)
from tests.helpers.s3 import Fault
from tests.helpers.streaming_reader import BUCKETS, EPOCH, loader, read

ROOT = Path(__file__).parents[3]
STEPS = 9


@pytest.fixture(scope="module")
def expected(stage):
    """Batches of one rank that reads alone."""
    return lines(stage, 4 * EPOCH, of=fake_rows)


def test_it_is_streamings_dataset_and_loader(stage):
    dataset = StreamingSnapshot(stage)
    assert isinstance(dataset, StreamingDataset)
    assert isinstance(loader(dataset), StreamingDataLoader)
    assert len(dataset) == EPOCH * stage.global_batch
    assert len(loader(dataset)) == EPOCH


DOCUMENTED = {*inspect.signature(StreamingDataset.__init__).parameters} - {"self"}
DOCUMENTED |= {
    "num_samples",
    "length",
    "size",
    "next_epoch",
    "shards",
    "cache_usage",
    "num_streams",
    "spanner",
}


def test_documented_attributes_are_there_or_say_why_not(stage):
    dataset = StreamingSnapshot(stage)
    there = {name: getattr(dataset, name) for name in DOCUMENTED if hasattr(dataset, name)}
    assert there == {
        "batch_size": stage.global_batch,
        "cache_limit": None,
        "epoch_size": len(dataset),
        "length": len(dataset),
        "next_epoch": 0,
        "num_canonical_nodes": stage.data.canonical_nodes,
        "num_samples": dataset.size,
        "replication": None,
        "shuffle": True,
        "shuffle_seed": stage.data.seed,
        "size": dataset.size,
    }
    for name in DOCUMENTED - there.keys():
        assert getattr(dataset, name, "a default") == "a default"
        with pytest.raises(AttributeError, match=f"has no `{name}`: its order, files and cache are those of"):
            getattr(dataset, name)
    assert copy.copy(dataset).shuffle_seed == stage.data.seed


@pytest.mark.parametrize("record", [None, 7, "text", [1, 2], {}, {"epoch": 1}, {1: 2}, {"x" * 999: None}])
def test_foreign_positions_are_one_short_line(stage, record):
    with pytest.raises(UserError, match="not a position in a snapshot: ") as refused:
        StreamingSnapshot(stage).load_state_dict(record)
    assert len(str(refused.value)) < 250


def test_a_row_joins_the_columns_of_all_families(stage):
    there = {number: part.bucket for part, numbers in fake.ids_of(BUCKETS).items() for number in numbers}
    dataset = StreamingSnapshot(stage)
    rows = dataset[:]
    assert rows == [fake_row(row["id"], there[row["id"]]) for row in rows]
    assert [row["id"] for row in rows] == sorted(there)
    assert dataset[-1] == rows[-1]


@settings(deadline=None, max_examples=30)
@given(
    world=st.sampled_from([1, 2, 4]),
    workers=st.integers(1, 4),
    epoch=st.integers(0, 3),
    start=st.integers(0, EPOCH),
)
def test_batches_are_those_of_our_loader_in_any_world(stage, world, workers, epoch, start):
    """Also when another world begins where this one stopped."""
    for rank in range(world):
        data = open_data(stage, rank, world)
        taken = itertools.islice(data.batches(data.schedule.position(epoch, 0)), EPOCH)
        wanted = [batch.ids.tolist() for batch, _ in taken][start:]
        data.close()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"RANK": rank, "WORLD_SIZE": world}.items():
                patch.setenv(name, str(value))
            dataset = StreamingSnapshot(stage)
            dataset.load_state_dict(data.schedule.position(epoch, start).to_dict())
            dataset.begin()
            shares = []
            for number in range(workers):
                worker = SimpleNamespace(id=number, num_workers=workers)
                dataset._is_kept = False
                patch.setattr(streaming_snapshot, "get_worker_info", lambda worker=worker: worker)
                ids = [row["id"] for row in dataset]
                shares.append(
                    [ids[at : at + dataset.batch_size] for at in range(0, len(ids), dataset.batch_size)]
                )
        rounds = itertools.zip_longest(*shares)  # as a DataLoader goes round its processes
        assert [batch for batches in rounds for batch in batches if batch] == wanted


@pytest.mark.parametrize(
    ("workers", "context", "kept"),
    [(0, None, False), (1, "fork", False), (3, "fork", False), (3, "fork", True), (2, "forkserver", True)],
)
def test_processes_of_any_number_and_kind_give_the_batches_of_our_loader(
    stage, expected, workers, context, kept
):
    batches = loader(StreamingSnapshot(stage), workers, context, persistent_workers=kept)
    assert [streaming_line(rows) for _ in range(4) for rows in batches] == expected


def test_two_ranks_share_the_batches(stage, tmp_path):
    data = {"cache": str(tmp_path / "cache"), "workers": 1}
    ended = Job(tmp_path, str(stage.data.store), data, STEPS, 2, reader="streaming").end()
    for rank, (code, printed, error) in enumerate(ended):
        assert code == 0, error
        assert printed == lines(stage, STEPS, rank, 2, fake_rows)


def mixture(folder):
    for name, rows in (("ds", [9, 8]), ("other", [7])):
        fake.make(folder / "store", {"64x64": rows}, folder, name=name)
    datasets = {"ds": DatasetShare(weight=2.0), "other": DatasetShare(weight=1.0)}
    return fake.stage(folder / "store", folder / "cache", dataset="", datasets=datasets)


def test_a_mixture_of_datasets(tmp_path):
    stage = mixture(tmp_path)
    dataset = StreamingSnapshot(stage)
    both = read(dataset, 2) + read(dataset)
    assert both == lines(stage, len(both), of=fake_rows)
    dataset.load_state_dict(dataset.data.schedule.position(1, 2).to_dict())
    assert read(dataset, 1) == both[len(both) // 2 + 2 :]


# -- errors ----------------------------------------------------------------------------------------


def test_a_file_that_is_cut_while_it_is_read_is_an_error_that_names_it(tmp_path):
    fake.make(tmp_path / "store", {"64x64": [4]}, tmp_path)
    dataset = StreamingSnapshot(fake.stage(tmp_path / "store", tmp_path / "cache"))
    rows = dataset[:]
    for path in (tmp_path / "store/ds/families").rglob("*.mds"):
        whole, says = (
            path.read_bytes(),
            f"{path}: the file ends too early: delete the file, or run `python -m data_prep verify`",
        )
        for end in range(0, len(whole), 7):
            path.write_bytes(whole[:end])
            right, message = [], None
            try:
                for number in range(4):
                    right.append(dataset[number])
            except StoreError as error:
                message = str(error)
            assert (right, message) == (rows[: len(right)], says)
        path.write_bytes(whole)
    assert dataset[:] == rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stage: setattr(stage.data, "tokens_per_batch", 64), "batches have one size"),
        (lambda stage: setattr(stage.fusion, "encode", "online"), "rows no captions"),
        (lambda stage: setattr(stage.fusion, "families", ["small", "none"]), "has no text family `none`"),
    ],
)
def test_what_streaming_cannot_give_is_refused(store, cache, change, says):
    stage = fake.stage(store, cache)
    change(stage)
    with pytest.raises(UserError, match=says):
        StreamingSnapshot(stage)


@pytest.mark.parametrize(("rows", "says"), [(5, "families disagree on rows"), (6, "hold other sample ids")])
def test_families_that_do_not_belong_together_are_not_joined(wrong_store, tmp_path, rows, says):
    with pytest.raises(UserError, match=rf"shard\.00000\.mds.*{says}"):
        read(StreamingSnapshot(fake.stage(wrong_store(rows), tmp_path / "cache")))


def test_a_local_store_is_only_read(store_of_another, tmp_path):
    assert len(read(StreamingSnapshot(fake.stage(store_of_another, tmp_path / "cache")))) == 2


# -- what is left behind ---------------------------------------------------------------------------


class Alone:
    """A job of one rank, in a process group of its own."""

    def __init__(self, stage, steps, temporary, workers=2, reader="streaming"):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "MARK": self.mark}
        data = {"cache": stage.data.cache, "workers": workers}
        command = [
            sys.executable,
            "-m",
            "tests.helpers.loader_process",
            json.dumps([stage.data.store, data, steps, reader]),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)

    def kill(self, alone):
        """All of its processes, as Slurm does at a job's end, or the trainer alone."""
        wait_until(lambda: len(processes_with(self.mark)) > 2 or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.process.communicate()[1]
        shared = shared_memory(processes_with(self.mark))
        (os.kill if alone else os.killpg)(self.process.pid, signal.SIGKILL)
        wait_until(lambda: not processes_with(self.mark), 10)
        self.process.communicate()
        return shared


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_and_restarted_unattended(store, expected, tmp_path, kills):
    """SIGKILL at any moment leaves no process, no shared memory, and nothing that stops the next start or a
    live job."""
    stage, moments = fake.stage(store, tmp_path / "cache"), random.Random(kills)
    (tmp_path / "temporary").mkdir()
    live = iter(loader(StreamingSnapshot(stage), 1))
    for number in range(kills):
        job = Alone(stage, 10**6, tmp_path / "temporary")
        time.sleep(moments.random())
        shared = job.kill(alone=number % 2 == 0)
        wait_until(lambda shared=shared: not any(path.exists() for path in shared), 10)
        assert not list((tmp_path / "temporary").rglob("*lock*"))
        if number < EPOCH:
            assert streaming_line(next(live)) == expected[number], "a live job goes on"
    job = Alone(stage, STEPS, tmp_path / "temporary")
    printed, error = job.process.communicate(timeout=60)
    assert (printed.splitlines(), job.process.returncode) == (expected[:STEPS], 0), error
    assert "leaked" not in error


# -- S3 --------------------------------------------------------------------------------------------


@pytest.fixture
def remote(s3, tmp_path):
    fake.make(s3, BUCKETS, tmp_path)
    return s3


def test_all_processes_share_one_download(remote, proxy, expected, tmp_path):
    stage = fake.stage(remote, tmp_path / "cache")
    for workers in (2, 0):
        assert read(StreamingSnapshot(stage), workers) == expected[:EPOCH]
    asked = [path for method, path, _ in proxy.requests if method == "GET" and ".mds" in path]
    assert len(asked) == len(set(asked)) == 12  # 4 parts of 3 families


@pytest.mark.parametrize("starts", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_eight_forked_workers_start_over_plain_http(remote, expected, tmp_path, starts):
    """A connection that two processes share hands one the other's bytes."""
    for start in range(starts):
        stage = fake.stage(remote, tmp_path / f"cache_{start}")
        assert read(StreamingSnapshot(stage), 8) == expected[:EPOCH]


def test_a_small_cache_evicts_and_fetches_again(remote, expected, tmp_path):
    read(StreamingSnapshot(fake.stage(remote, tmp_path / "free")))
    whole = [path.stat().st_size for path in (tmp_path / "free").rglob("*.mds")]
    limit = sum(whole) - max(whole)
    small = StreamingSnapshot(fake.stage(remote, tmp_path / "small", cache_limit_gb=limit / 1e9))
    assert read(small) + read(small) == expected[: 2 * EPOCH]
    assert sum(path.stat().st_size for path in (tmp_path / "small").rglob("*.mds")) <= limit


@pytest.mark.parametrize("reader", READERS)
def test_ctrl_c_does_not_wait_for_downloads_that_are_tried_again(
    remote, proxy, monkeypatch, tmp_path, reader
):
    """Neither for the one that the batch needs, nor for those ahead."""
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "600")
    proxy.faults[:] = [Fault("503", "GET", r"\.mds")]
    job = Alone(fake.stage(remote, tmp_path / "cache"), STEPS, tmp_path, workers=0, reader=reader)
    wait_until(lambda: proxy.faults[0].hits > 3, 60)
    job.process.send_signal(signal.SIGINT)
    _, error = job.process.communicate(timeout=30)
    assert job.process.returncode == -signal.SIGINT
    assert "\nKeyboardInterrupt\n" in error


def test_a_dataset_that_is_dropped_ends_its_threads(remote, tmp_path):
    before = threading.active_count()
    read(StreamingSnapshot(fake.stage(remote, tmp_path / "cache")))
    wait_until(lambda: threading.active_count() <= before)
