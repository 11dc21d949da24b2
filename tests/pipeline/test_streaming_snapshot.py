"""mosaicml-streaming reads a snapshot: the same batches as our own loader, whole files or an error, and nothing left behind.

The faults of stores are in `test_loader_faults.py`, for both readers.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import StreamingDataLoader
from streaming.base.world import World
from torch.utils.data import DataLoader

from model.errors import UserError
from pipeline import streaming_leftovers
from pipeline.config import DatasetShare
from pipeline.loader import TrainingData
from pipeline.streaming_leftovers import SHARED_MEMORY
from pipeline.streaming_snapshot import StreamingSnapshot
from tests.pipeline import fake_snapshot as fake
from tests.pipeline.loader_rank import Job, fake_row, fake_rows, lines, processes_with, streaming_line, wait_until
from tests.pipeline.worlds import CPU

ROOT = Path(__file__).parents[2]
BUCKETS = {"64x64": [9, 8], "48x80": [7, 6]}
STEPS = 9  # an epoch has 7


def ids_of(rows):
    """Collate to what a test compares; the first value has one entry a sample, as StreamingDataLoader wants it."""
    return torch.tensor([row["id"] for row in rows])


def read(dataset, workers=0, **processes):
    return DataLoader(dataset, dataset.batch_size, num_workers=workers, collate_fn=list, **processes)


@pytest.fixture(scope="module")
def stage(store, cache):
    return fake.stage(store, cache)


@pytest.fixture(scope="module")
def dataset(stage):
    return StreamingSnapshot(stage)


@pytest.fixture(scope="module")
def ids(dataset):
    """Sample id of each of streaming's numbers."""
    return [dataset[number]["id"] for number in range(dataset.num_samples)]


@pytest.fixture(scope="module")
def expected(stage):
    """Batches of one rank that reads alone."""
    return lines(stage, STEPS, of=fake_rows)


def test_a_row_joins_the_columns_of_all_families(dataset):
    there = {number: part.bucket for part, numbers in fake.ids_of(BUCKETS).items() for number in numbers}
    rows = [dataset[number] for number in range(dataset.num_samples)]
    assert rows == [fake_row(row["id"], there[row["id"]]) for row in rows]
    assert {row["id"] for row in rows} == set(there)


@settings(deadline=None, max_examples=40)
@given(
    nodes=st.sampled_from([1, 2]),
    ranks=st.sampled_from([1, 2]),
    workers=st.integers(1, 4),
    epoch=st.integers(0, 3),
    start=st.integers(0, 7),
)
def test_global_batches_are_those_of_our_loader_in_any_world(stage, dataset, ids, nodes, ranks, workers, epoch, start):
    """Also when another world begins where this one stopped."""
    data = TrainingData(stage, 0, 1, CPU)
    wanted = [batch.ids.tolist() for batch, _ in itertools.islice(data.batches(data.position(epoch, 0)), 7)]
    data.close()
    work = dataset.work(World(nodes, ranks, workers, 0), epoch, start * stage.global_batch)
    assert work.shape[:3] == (nodes, ranks, workers)
    rounds = work.transpose(3, 2, 0, 1, 4).reshape(-1, stage.global_batch)  # as a DataLoader goes round its processes
    assert [[ids[number] for number in batch] for batch in rounds.tolist() if -1 not in batch] == wanted[start:]
    assert (rounds[len(wanted) - start :] == -1).all()


@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (3, "fork"), (2, "forkserver")])
def test_processes_of_any_number_and_kind_give_the_batches_of_our_loader(stage, expected, workers, context):
    loader = read(StreamingSnapshot(stage), workers, multiprocessing_context=context)
    assert len(loader) == 7
    first, second = ([streaming_line(rows) for rows in loader] for _ in range(2))
    assert len(first) == len(second) == 7
    assert (first + second)[:STEPS] == expected


def test_two_ranks_share_the_batches(stage, tmp_path):
    data = {"cache": str(tmp_path / "cache"), "workers": 1}
    ended = Job(tmp_path, stage.data.store, data, STEPS, 2, reader="streaming").end()
    for rank, (code, printed, error) in enumerate(ended):
        assert code == 0, error
        assert printed == lines(stage, STEPS, rank, 2, fake_rows)


def test_a_mixture_of_datasets(tmp_path):
    for name, rows in (("ds", [9, 8]), ("other", [7])):
        fake.make(tmp_path / "store", {"64x64": rows}, tmp_path, name=name)
    datasets = {"ds": DatasetShare(weight=2.0), "other": DatasetShare(weight=1.0)}
    stage = fake.stage(tmp_path / "store", tmp_path / "cache", dataset="", datasets=datasets)
    steps = len(StreamingSnapshot(stage)) // stage.global_batch
    assert [streaming_line(rows) for rows in read(StreamingSnapshot(stage), 2)] == lines(stage, steps, of=fake_rows)


# -- resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "before", "after"), [(3, 0, 2), (6, 2, 0), (7, 1, 1)])
def test_resume_repeats_an_uninterrupted_run(stage, expected, stop, before, after):
    wanted = [json.loads(batch)[0] for batch in expected]

    def loader(workers):
        dataset = StreamingSnapshot(stage)
        return StreamingDataLoader(dataset, batch_size=dataset.batch_size, num_workers=workers, collate_fn=ids_of)

    first = loader(before)
    assert [batch.tolist() for batch in itertools.islice(first, stop)] == wanted[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"]["batch"] == stop
    second = loader(after)
    second.load_state_dict(state)
    rest = [batch.tolist() for _ in range(2) for batch in second]
    assert rest[: STEPS - stop] == wanted[stop:]


def test_a_position_in_another_order_is_refused(stage, store, cache):
    state = StreamingSnapshot(stage).state_dict(2 * stage.global_batch, True)
    with pytest.raises(UserError, match="global_batch was 4 and is 2"):
        StreamingSnapshot(fake.stage(store, cache, global_batch=2)).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        StreamingSnapshot(fake.stage(store, cache, seed=1)).load_state_dict(state)


def test_a_count_that_is_no_whole_batches_is_refused(dataset, stage):
    """As StreamingDataLoader counts them where the first value of a batch is not one a sample."""
    with pytest.raises(UserError, match="9 samples are not whole batches of 4"):
        dataset.state_dict(9, True)


# -- what cannot be read so -----------------------------------------------------------------------------------------------


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


def test_ranks_without_a_process_group_are_refused(stage, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="init_process_group"):
        StreamingSnapshot(stage)


@pytest.mark.parametrize(("rows", "says"), [(5, "families disagree on rows"), (6, "hold other sample ids")])
def test_families_that_do_not_belong_together_are_not_joined(wrong_store, tmp_path, rows, says):
    with pytest.raises(UserError, match=rf"shard\.00000\.mds.*{says}"):
        list(read(StreamingSnapshot(fake.stage(wrong_store(rows), tmp_path / "cache"))))


def test_a_local_store_is_only_read(store_of_another, tmp_path):
    assert len(list(read(StreamingSnapshot(fake.stage(store_of_another, tmp_path / "cache"))))) == 2


# -- what is left behind --------------------------------------------------------------------------------------------------


def folders(cache):
    """Of jobs on a cache."""
    return sorted(Path(cache).glob("streaming/*/*"))


def segments(folder):
    """Shared memory that names a job's folder."""
    named = [path for path in SHARED_MEMORY.glob("[0-9]*_locals") if str(folder).encode() in path.read_bytes()]
    return sorted(path for names in named for path in SHARED_MEMORY.glob(names.name.replace("locals", "*")))


class Alone:
    """A job of one rank and two loader processes, in a process group of its own."""

    def __init__(self, stage, steps, temporary):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "MARK": self.mark}
        data = {"cache": stage.data.cache, "workers": 2}
        command = [sys.executable, "-m", "tests.pipeline.loader_rank", json.dumps([stage.data.store, data, steps, "streaming"])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)

    def kill(self):
        """All of its processes, Python's tracker of shared memory too, as Slurm does at a job's end."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        wait_until(lambda: not processes_with(self.mark), 10)


@pytest.fixture
def foreign():
    """Shared memory of a job that is not ours, whether it lives or not."""
    paths = [SHARED_MEMORY / f"999998_{name}" for name in ("locals", "barrier")]
    for path in paths:
        path.write_bytes(b"\0\0\0\0/somewhere/else/streaming/host/job/0-64x64")
    yield paths
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_start_removes_what_killed_jobs_left_and_nothing_else(store, expected, foreign, tmp_path, kills):
    """And what ends by itself leaves nothing."""
    stage, moments = fake.stage(store, tmp_path / "cache"), random.Random(kills)
    (tmp_path / "temporary").mkdir()
    live = iter(read(StreamingSnapshot(stage)))
    (living,) = folders(tmp_path / "cache")
    kept = segments(living)
    assert len(kept) > 6
    for number in range(kills):
        job = Alone(stage, 10**6, tmp_path / "temporary")
        wait_until(lambda: any(segments(folder) for folder in folders(tmp_path / "cache") if folder != living), 60)
        time.sleep(moments.random())
        job.kill()
        (dead,) = set(folders(tmp_path / "cache")) - {living}
        left = segments(dead)
        assert left
        job = Alone(stage, STEPS, tmp_path / "temporary")
        printed, error = job.process.communicate(timeout=60)
        assert (printed.splitlines(), job.process.returncode) == (expected, 0), error
        assert "leaked" not in error
        assert folders(tmp_path / "cache") == [living]
        assert not [path for path in SHARED_MEMORY.glob("[0-9]*") if path not in [*kept, *foreign] and in_cache(path, tmp_path)]
        assert not any(path.exists() for path in left)
        assert not list((tmp_path / "temporary").glob("*filelock"))
        if number < 7:
            assert streaming_line(next(live)) == expected[number], "a live job goes on"
    assert all(path.exists() for path in [*kept, *foreign])


def in_cache(path, cache):
    return path.name.endswith("_locals") and str(cache).encode() in path.read_bytes()


def test_a_lock_that_was_taken_for_a_dead_jobs_is_not_joined(tmp_path, monkeypatch):
    """Between making its folder and locking it, a job looks dead."""
    jobs, taken = tmp_path / "jobs", []
    flock = streaming_leftovers.fcntl.flock

    def interrupted(file, how):
        if how == streaming_leftovers.fcntl.LOCK_SH and not taken:
            taken.extend(streaming_leftovers.remove_leftovers(jobs))
        flock(file, how)

    monkeypatch.setattr(streaming_leftovers.fcntl, "flock", interrupted)
    lock = streaming_leftovers._enter(jobs / "job")
    assert taken == [jobs / "job"]
    assert streaming_leftovers.remove_leftovers(jobs) == []
    lock.close()
    assert streaming_leftovers.remove_leftovers(jobs) == [jobs / "job"]


# -- S3 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(s3, tmp_path):
    fake.make(s3, BUCKETS, tmp_path)
    return s3


def test_all_processes_share_one_download(remote, proxy, expected, tmp_path):
    stage = fake.stage(remote, tmp_path / "cache")
    for workers in (2, 0):
        assert [streaming_line(rows) for rows in read(StreamingSnapshot(stage), workers)] == expected[:7]
    asked = [path for method, path, _ in proxy.requests if method == "GET" and ".mds" in path]
    assert len(asked) == len(set(asked)) == 12  # 4 parts of 3 families


@pytest.mark.parametrize("starts", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_eight_forked_workers_start_over_plain_http(remote, expected, tmp_path, starts):
    """A connection that two processes share hands one the other's bytes."""
    for start in range(starts):
        stage = fake.stage(remote, tmp_path / f"cache_{start}")
        loader = read(StreamingSnapshot(stage), 8, multiprocessing_context="fork")
        assert [streaming_line(rows) for rows in loader] == expected[:7]


def test_a_small_cache_evicts_and_fetches_again(remote, expected, tmp_path):
    for _ in read(StreamingSnapshot(fake.stage(remote, tmp_path / "free"))):
        pass
    whole = [path.stat().st_size for path in (tmp_path / "free").rglob("*.mds")]
    limit = sum(whole) - max(whole)
    small = StreamingSnapshot(fake.stage(remote, tmp_path / "small", cache_limit_gb=limit / 1e9))
    loader = read(small)
    assert [streaming_line(rows) for _ in range(2) for rows in loader][:STEPS] == expected
    assert sum(path.stat().st_size for path in (tmp_path / "small").rglob("*.mds")) <= limit
