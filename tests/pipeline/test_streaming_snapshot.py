"""mosaicml-streaming reads a snapshot: the same batches as our own loader, whole files or an error, and nothing left behind.

The faults of stores are in `test_loader_faults.py`, for both readers.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from data_prep.store import StoreError
from model.errors import UserError
from pipeline import streaming_snapshot
from pipeline.config import DatasetShare
from pipeline.loader import TrainingData
from pipeline.streaming_snapshot import JoinedReader, SnapshotLoader, StreamingSnapshot
from tests.distributed import on_ranks
from tests.pipeline import fake_snapshot as fake
from tests.pipeline.loader_rank import (
    Job,
    fake_row,
    fake_rows,
    lines,
    processes_with,
    shared_memory,
    streaming_line,
    wait_until,
)
from tests.pipeline.worlds import CPU

ROOT = Path(__file__).parents[2]
BUCKETS = {"64x64": [9, 8], "48x80": [7, 6]}
EPOCH = 7
STEPS = 9


def loader(dataset, workers=0, context="fork", collate=list, **options):
    context = context if workers else None
    return SnapshotLoader(dataset, num_workers=workers, collate_fn=collate, multiprocessing_context=context, **options)


def read(dataset, workers=0, **options):
    """The next epoch, or what is left of one."""
    return [streaming_line(rows) for rows in loader(dataset, workers, **options)]


@pytest.fixture(scope="module")
def stage(store, cache):
    return fake.stage(store, cache)


@pytest.fixture(scope="module")
def expected(stage):
    """Batches of one rank that reads alone: four epochs."""
    return lines(stage, 4 * EPOCH, of=fake_rows)


def test_it_is_streamings_dataset_and_loader(stage):
    dataset = StreamingSnapshot(stage)
    assert isinstance(dataset, StreamingDataset)
    assert isinstance(loader(dataset), StreamingDataLoader)
    assert len(dataset) == EPOCH * stage.global_batch
    assert len(loader(dataset)) == EPOCH


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
        data = TrainingData(stage, rank, world, CPU)
        taken = itertools.islice(data.batches(data.position(epoch, 0)), EPOCH)
        wanted = [batch.ids.tolist() for batch, _ in taken][start:]
        data.close()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"RANK": rank, "WORLD_SIZE": world}.items():
                patch.setenv(name, str(value))
            dataset = StreamingSnapshot(stage)
            dataset.load_state_dict(data.position(epoch, start).to_dict())
            dataset.begin()
            shares = []
            for number in range(workers):
                worker = SimpleNamespace(id=number, num_workers=workers)
                dataset._is_kept = False
                patch.setattr(streaming_snapshot, "get_worker_info", lambda worker=worker: worker)
                ids = [row["id"] for row in dataset]
                shares.append([ids[at : at + dataset.batch_size] for at in range(0, len(ids), dataset.batch_size)])
        rounds = itertools.zip_longest(*shares)  # as a DataLoader goes round its processes
        assert [batch for batches in rounds for batch in batches if batch] == wanted


@pytest.mark.parametrize(
    ("workers", "context", "kept"),
    [(0, None, False), (1, "fork", False), (3, "fork", False), (3, "fork", True), (2, "forkserver", True)],
)
def test_processes_of_any_number_and_kind_give_the_batches_of_our_loader(stage, expected, workers, context, kept):
    batches = loader(StreamingSnapshot(stage), workers, context, persistent_workers=kept)
    assert [streaming_line(rows) for _ in range(4) for rows in batches] == expected


def test_an_epoch_that_was_left_early_changes_nothing_for_the_next(stage, expected):
    """Nor do other numbers of processes: the dataset's epochs go on."""
    dataset = StreamingSnapshot(stage)
    for workers in (0, 2):
        iterator = iter(loader(dataset, workers))
        assert streaming_line(next(iterator)) == expected[EPOCH * (workers // 2)]
        del iterator
    assert read(dataset, 3) == expected[2 * EPOCH : 3 * EPOCH]
    iterator = iter(DataLoader(dataset, dataset.batch_size, num_workers=2, collate_fn=list))
    del iterator  # before a process has begun
    dataset.next_epoch = 1
    assert read(dataset, 2) == expected[EPOCH : 2 * EPOCH]


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
    dataset.load_state_dict(dataset.data.position(1, 2).to_dict())
    assert read(dataset, 1) == both[len(both) // 2 + 2 :]


# -- errors ---------------------------------------------------------------------------------------------------------------


def fail_on_rank_0(store, cache):
    """What a rank reads and then meets, where rank 0 cannot have a file."""
    get, rows = JoinedReader.get_sample_data, itertools.count()

    def failing(reader, row):
        if dist.get_rank() == 0 and next(rows) == 2 * 2:
            raise StoreError("families/small/x.mds: 503 SlowDown")
        return get(reader, row)

    JoinedReader.get_sample_data = failing
    read = []
    try:
        for batch in loader(StreamingSnapshot(fake.stage(store, cache))):
            read.append(streaming_line(batch))
            dist.barrier() if len(read) < 2 else time.sleep(1)
    except StoreError as error:
        return read, str(error)
    finally:
        JoinedReader.get_sample_data = get


def test_an_error_of_one_rank_is_every_ranks(stage, store, cache):
    """With the name of the shard, on one line."""
    (first, says_first), (second, says_second) = on_ranks(2, fail_on_rank_0, str(store), str(cache))
    for rank, read in enumerate((first, second)):
        assert read == lines(stage, len(read), rank, 2, fake_rows)
    assert says_first == "families/small/x.mds: 503 SlowDown"
    assert says_second == "families/small/x.mds: 503 SlowDown (on rank 0)"
    assert len(first) == 2
    assert len(second) < EPOCH


def other_world(store, cache):
    os.environ["WORLD_SIZE"] = "1"
    try:
        StreamingSnapshot(fake.stage(store, cache))
    except UserError as error:
        return str(error)
    finally:
        os.environ["WORLD_SIZE"] = "2"


def test_ranks_that_the_environment_does_not_know_are_refused(store, cache):
    for says in on_ranks(2, other_world, str(store), str(cache)):
        assert "set RANK and WORLD_SIZE" in says


def test_a_loader_that_does_not_begin_its_epochs_is_refused(stage, expected):
    dataset = StreamingSnapshot(stage)
    plain = DataLoader(dataset, dataset.batch_size, collate_fn=list)
    with pytest.raises(UserError, match=r"call begin\(\) before each epoch"):
        next(iter(plain))
    for epoch in range(2):
        dataset.begin()
        assert [streaming_line(rows) for rows in plain] == expected[EPOCH * epoch : EPOCH * (epoch + 1)]
        with pytest.raises(UserError, match=r"call begin\(\) before each epoch"):
            next(iter(plain))


def test_an_error_of_a_loader_process_is_one_line_and_ends_the_others(wrong_store, tmp_path):
    before = multiprocessing.active_children()
    dataset = StreamingSnapshot(fake.stage(wrong_store(5), tmp_path / "cache"))
    with pytest.raises(StoreError, match=r"^\S*shard\.00000\.mds: families disagree on rows: take the snapshot again$"):
        read(dataset, 2)
    assert set(multiprocessing.active_children()) <= set(before), "none of its own; processes of other tests may end meanwhile"


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    fake.make(tmp_path / "store", {"64x64": [4]}, tmp_path)
    dataset = StreamingSnapshot(fake.stage(tmp_path / "store", tmp_path / "cache"))
    assert dataset[3]["id"] == 3
    (path,) = (tmp_path / "store/ds/families/latents").rglob("*.mds")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match=rf"{path}: a row is damaged"):
        dataset[3]


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


# -- resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "stop", "before", "after"), [(0, 3, 0, 2), (1, 6, 2, 0), (1, 7, 1, 1), (0, 0, 0, 0)])
def test_resume_repeats_an_uninterrupted_run(stage, expected, epoch, stop, before, after):
    dataset = StreamingSnapshot(stage)
    for _ in range(epoch):
        assert len(read(dataset)) == EPOCH
    batches = loader(dataset, before)
    if stop:
        taken = [streaming_line(rows) for rows in itertools.islice(batches, stop)]
        assert taken == expected[EPOCH * epoch :][:stop]
    state = json.loads(json.dumps(batches.state_dict()))
    assert (state["epoch"], state["batch"]) == divmod(EPOCH * epoch + stop, EPOCH)
    new = StreamingSnapshot(stage)
    for resumed in (new, dataset):  # in another process, and in the one that went on
        batches = loader(resumed, after)
        batches.load_state_dict(state)
        assert batches.state_dict() == state
        rest = [streaming_line(rows) for _ in range(2) for rows in batches]
        assert rest == expected[EPOCH * epoch + stop :][: len(rest)]
        assert len(rest) > EPOCH
        assert batches.state_dict()["epoch"] == state["epoch"] + 2


def test_resume_of_a_resumed_epoch(stage, expected):
    batches = loader(StreamingSnapshot(stage))
    for start in range(0, 6, 2):
        assert [streaming_line(rows) for rows in itertools.islice(batches, 2)] == expected[start : start + 2]
        state = batches.state_dict()
        assert state["batch"] == start + 2
        batches = loader(StreamingSnapshot(stage))
        batches.load_state_dict(state)


def test_a_position_in_another_order_is_refused(stage, store, cache):
    state = StreamingSnapshot(stage).state_dict(2 * stage.global_batch, True)
    with pytest.raises(UserError, match="global_batch was 4 and is 2"):
        StreamingSnapshot(fake.stage(store, cache, global_batch=2)).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        StreamingSnapshot(fake.stage(store, cache, seed=1)).load_state_dict(state)
    at_the_end = StreamingSnapshot(stage).state_dict(EPOCH * stage.global_batch, True)
    StreamingSnapshot(fake.stage(store, cache, global_batch=2)).load_state_dict(at_the_end)


def test_a_count_that_is_no_whole_batches_is_refused(stage):
    """As StreamingDataLoader itself counts, where the first value of a batch is not one a sample."""
    with pytest.raises(UserError, match="9 samples are not whole batches of 4"):
        StreamingSnapshot(stage).state_dict(9, True)


# -- what is left behind --------------------------------------------------------------------------------------------------


class Alone:
    """A job of one rank and two loader processes, in a process group of its own."""

    def __init__(self, stage, steps, temporary):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "MARK": self.mark}
        data = {"cache": stage.data.cache, "workers": 2}
        command = [sys.executable, "-m", "tests.pipeline.loader_rank", json.dumps([stage.data.store, data, steps, "streaming"])]
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


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_and_restarted_unattended(store, expected, tmp_path, kills):
    """SIGKILL at any moment leaves no process, no shared memory, and nothing that stops the next start or a live job."""
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


# -- S3 -------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("starts", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
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
