"""A loop around mosaicml-streaming's loader: errors on all ranks, positions, resume, epochs left early."""

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import signal
from multiprocessing import resource_tracker
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data_prep.store.store import StoreError
from model.common.errors import UserError
from pipeline.data import streaming as streaming_snapshot
from pipeline.data.streaming import StreamingSnapshot
from pipeline.data.threads import Threads
from pipeline.runtime.distributed import free_port
from tests.helpers import fake_snapshot as fake
from tests.helpers import streaming_reader
from tests.helpers.distributed import CONTEXT, on_ranks
from tests.helpers.loader_process import fake_rows, lines, streaming_line
from tests.helpers.streaming_reader import EPOCH, loader, place, read

BUCKETS = streaming_reader.BUCKETS  # of the store


@pytest.fixture(scope="module")
def expected(stage):
    """Batches of one rank that reads alone."""
    return lines(stage, 4 * EPOCH, of=fake_rows)


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


ERRORS = {
    "store": StoreError("families/small/x.mds: 503 SlowDown"),
    "other": ValueError("what is this?"),
    "silent": StoreError(""),
}


def fail_on_rank_0(store, cache, kind, row):
    """Batches and error of a rank where rank 0 fails at a row; and the number of batches of the next one."""
    read_row, rows = StreamingSnapshot.read_row, itertools.count()

    def failing(dataset, shards, index):
        if dist.get_rank() == 0 and next(rows) == row:
            raise ERRORS[kind]
        return read_row(dataset, shards, index)

    StreamingSnapshot.read_row = failing
    dataset, read, says = StreamingSnapshot(fake.stage(store, cache)), [], ""
    try:
        for batch in loader(dataset):
            read.append(streaming_line(batch))
            dist.all_reduce(torch.ones(()))
    except (StoreError, ValueError) as error:
        says = repr(error)
    finally:
        StreamingSnapshot.read_row = read_row
    return read, says, len(list(loader(dataset)))


@pytest.mark.parametrize(
    ("kind", "row"), [("store", 4), ("store", 2 * EPOCH - 1), ("other", 5), ("silent", 5)]
)
def test_an_error_of_one_rank_is_every_ranks_at_the_same_batch(stage, store, cache, kind, row):
    """With the name of the shard, also where each step is a collective; and once all have caught it, it is
    over."""
    ended = on_ranks(2, fail_on_rank_0, str(store), str(cache), kind, row)
    says = {
        "store": [
            f"StoreError('families/small/x.mds: 503 SlowDown{where}')" for where in ("", " (on rank 0)")
        ],
        "other": ["ValueError('what is this?')", """StoreError("ValueError('what is this?') (on rank 0)")"""],
        "silent": ["StoreError('')", """StoreError("StoreError('') (on rank 0)")"""],
    }
    for rank, (trained_on, said, after) in enumerate(ended):
        assert trained_on == lines(stage, row // 2, rank, 2, fake_rows)
        assert said == says[kind][rank]
        assert after == EPOCH


def die_in_the_first_batch(rank, port, store, cache):
    def die(dataset, shards, index):
        os._exit(9)

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    if rank == 1:
        StreamingSnapshot.read_row = die
    try:
        list(loader(StreamingSnapshot(fake.stage(store, cache))))
    except RuntimeError:
        os._exit(3)


def test_a_rank_that_dies_in_its_first_batch_keeps_nobody_waiting(store, cache):
    port = free_port()
    ranks = [
        CONTEXT.Process(target=die_in_the_first_batch, args=(rank, port, str(store), str(cache)))
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [3, 9]
    finally:
        for rank in ranks:
            rank.kill()


def test_an_error_is_raised_though_another_rank_has_gone(stage, monkeypatch):
    def failing(dataset, shards, index):
        raise StoreError("x.mds: 503")

    def fail(failure):
        raise RuntimeError("Connection closed by peer")

    dataset = StreamingSnapshot(stage)
    batches = iter(loader(dataset))
    next(batches)
    monkeypatch.setattr(streaming_snapshot, "first_failure", fail)
    monkeypatch.setattr(StreamingSnapshot, "read_row", failing)
    with pytest.raises(StoreError, match=r"^x\.mds: 503$"):
        next(batches)


def open_before_the_group(store, cache, world):
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    os.environ["WORLD_SIZE"] = world
    try:
        batches = loader(StreamingSnapshot(fake.stage(store, cache)))
    finally:
        dist.is_initialized = is_initialized
        os.environ["WORLD_SIZE"] = "2"
    try:
        return len(list(batches))
    except UserError as error:
        return str(error)


def test_ranks_that_the_dataset_does_not_know_are_refused(store, cache):
    """They would train on the same samples."""
    assert on_ranks(2, open_before_the_group, str(store), str(cache), "2") == [EPOCH, EPOCH]
    for rank, says in enumerate(on_ranks(2, open_before_the_group, str(store), str(cache), "4")):
        assert f"as rank {rank} of 4, and this is rank {rank} of 2: open it after init_process_group" in says


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
    with pytest.raises(
        StoreError, match=r"^\S*shard\.00000\.mds: families disagree on rows: take the snapshot again$"
    ):
        read(dataset, 2)
    assert set(multiprocessing.active_children()) <= set(before), (
        "none of its own; processes of other tests may end meanwhile"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 8}, r"batch_size=8: the stage's batches have batch_size=4"),
        ({"in_order": False}, "in_order=False"),
    ],
)
def test_options_that_would_give_other_batches_are_refused(stage, options, says):
    with pytest.raises(UserError, match=says):
        loader(StreamingSnapshot(stage), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_ends_early_is_an_error(stage, workers):
    """torch takes a StopIteration that escapes from anywhere for the data's end."""
    calls = itertools.count(1)

    def collate(rows):
        return next(iter([])) if next(calls) == 3 else rows

    with pytest.raises(
        RuntimeError, match=r"epoch 0 has ended early, at batch \d: does collate_fn raise StopIteration\?"
    ):
        list(loader(StreamingSnapshot(stage), workers, collate=collate))


def names_that_threads_leave():
    """Names that the threads of a process from a fork server register for removal after its end."""
    registered, register = [], resource_tracker.register
    resource_tracker.register = lambda *what: registered.append(what)
    try:
        with Threads(2) as pool:
            assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
    finally:
        resource_tracker.register = register
    return registered


def test_threads_leave_no_name_behind():
    assert on_ranks(2, names_that_threads_leave) == [[], []]


def test_the_batch_size_may_be_named(stage, expected):
    dataset = StreamingSnapshot(stage)
    assert (
        read(dataset, 2, batch_size=dataset.batch_size, drop_last=True, prefetch_factor=3) == expected[:EPOCH]
    )


@pytest.mark.parametrize("again", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_of_the_dataset_reads_the_same(stage, expected, again):
    batches = loader(again(StreamingSnapshot(stage)), 2, persistent_workers=True)
    assert [streaming_line(rows) for _ in range(3) for rows in batches] == expected[: 3 * EPOCH]


def test_signals_that_are_meant_for_the_trainer_leave_loader_processes_alone(stage, expected):
    before = multiprocessing.active_children()
    batches = iter(loader(StreamingSnapshot(stage), 2, prefetch_factor=1))
    taken = [next(batches), next(batches)]  # one of each process, so that both have started
    for process in set(multiprocessing.active_children()) - set(before):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(process.pid, number)
    assert [streaming_line(rows) for rows in (*taken, *batches)] == expected[:EPOCH]


def test_an_iteration_reads_the_turn_in_which_it_began(stage, expected, monkeypatch):
    """Not the one that has begun when a loader process, which is kept, comes to its first row."""
    monkeypatch.setattr(streaming_snapshot, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    monkeypatch.setattr(streaming_snapshot, "become_loader_process", lambda: None)
    dataset = StreamingSnapshot(stage)
    turns = []
    for _ in range(3):
        dataset.begin()
        turns.append(iter(dataset))
    for number in (2, 0, 1):
        rows = list(turns[number])
        batches = [rows[at : at + 4] for at in range(0, len(rows), 4)]
        assert [streaming_line(batch) for batch in batches] == expected[EPOCH * number :][:EPOCH]


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "stop", "before", "after"), [(0, 3, 0, 2), (1, 6, 2, 0), (1, 7, 1, 1), (0, 0, 0, 0)]
)
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
    """As StreamingDataLoader itself counts, if the first value of a batch has not one entry per sample."""
    with pytest.raises(UserError, match="9 samples are not whole batches of 4"):
        StreamingSnapshot(stage).state_dict(9, True)


def test_a_record_of_something_else_is_refused(stage):
    """Such as a position of StreamingDataset's own."""
    with pytest.raises(UserError, match="not a position in a snapshot: a record of epoch, sample_in_epoch"):
        StreamingSnapshot(stage).load_state_dict({"epoch": 1, "sample_in_epoch": 4})


# -- where the dataset goes on, whoever moves it ---------------------------------------------------


def test_a_position_that_the_dataset_takes_is_the_loaders(stage, expected):
    """As trainers do that keep the dataset's state by themselves."""
    dataset = StreamingSnapshot(stage)
    batches = loader(dataset)
    list(itertools.islice(batches, 2))
    state = batches.state_dict()
    list(itertools.islice(batches, 3))
    dataset.load_state_dict(state)
    assert batches.state_dict() == state
    assert [streaming_line(rows) for rows in batches] == expected[2:EPOCH]
    dataset.next_epoch = 5
    assert place(batches.state_dict()) == (5, 0)


@pytest.mark.parametrize("taken", [1, EPOCH])
def test_a_new_loader_goes_on_with_the_next_epoch(stage, expected, taken):
    dataset = StreamingSnapshot(stage)
    first = loader(dataset)
    list(itertools.islice(first, taken))
    second = loader(dataset)
    assert place(second.state_dict()) == (1, 0)
    assert [streaming_line(rows) for rows in second] == expected[EPOCH : 2 * EPOCH]
    assert place(second.state_dict()) == (2, 0)
    assert place(first.state_dict()) == divmod(taken, EPOCH)


def test_two_loaders_at_once_know_their_own_places(stage):
    dataset = StreamingSnapshot(stage)
    loaders = loader(dataset, 2), loader(dataset)
    iterators = [iter(each) for each in loaders]
    for number in (0, 0, 1):
        next(iterators[number])
    assert [place(each.state_dict()) for each in loaders] == [(0, 2), (1, 1)]


def test_who_counts_samples_by_itself_goes_on_exactly(stage):
    """As Composer does: none of the next epoch, once one is over."""
    dataset = StreamingSnapshot(stage)
    for epoch in range(2):
        assert place(dataset.state_dict(0, True)) == (epoch, 0)
        for number, _ in enumerate(loader(dataset), 1):
            assert place(dataset.state_dict(number * 4, True)) == divmod(EPOCH * epoch + number, EPOCH)
    assert place(dataset.state_dict(0, True)) == (2, 0)
    dataset.load_state_dict(dataset.state_dict(3 * 4, True))
    assert place(dataset.state_dict(0, True)) == (1, 0)
    for samples in (-4, (EPOCH + 1) * 4):
        with pytest.raises(
            UserError,
            match=rf"batch {samples // 4} of epoch 1, which has {EPOCH}: count from 0 in each epoch",
        ):
            dataset.state_dict(samples, True)
