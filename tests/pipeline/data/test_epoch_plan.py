"""The plan of an epoch: each row once, one bucket per batch, the same on any number of processes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.epoch_plan import EpochPlan, sample_rng

PARTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
BUCKETS = st.dictionaries(st.sampled_from(["64x64", "48x80", "80x48"]), PARTS, min_size=1)
SEEDS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 5))
SIZES = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 4))
SHAPE = st.builds(lambda seeds, buckets, sizes: (*seeds, buckets, *sizes), SEEDS, BUCKETS, SIZES)


def make(shape):
    seed, epoch, buckets, nodes, per_node, window = shape
    return EpochPlan(seed, epoch, buckets, nodes * per_node, nodes, window)


def pairs(rows):
    return list(zip(rows.parts.tolist(), rows.rows.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(SHAPE)
def test_each_row_once_but_for_the_left_over(shape):
    plan, buckets, batch = make(shape), shape[2], shape[3] * shape[4]
    seen = {bucket: [] for bucket in buckets}
    for index in range(len(plan)):
        rows = plan.batch(index)
        assert len(rows.parts) == batch
        seen[rows.bucket] += pairs(rows)
    for bucket, sizes in buckets.items():
        there = {(part, row) for part, size in enumerate(sizes) for row in range(size)}
        assert len(set(seen[bucket])) == len(seen[bucket])
        assert set(seen[bucket]) <= there
        assert len(there) - len(seen[bucket]) == plan.left_over()[bucket] < batch


@settings(max_examples=60, deadline=None)
@given(SHAPE, st.integers(1, 3))
def test_ranks_slices_make_the_global_batch(shape, factor):
    plan = make(shape)
    worlds = [world for world in range(1, 9) if shape[3] * shape[4] % world == 0]
    for index in range(len(plan)):
        whole = pairs(plan.batch(index))
        for world in worlds:
            assert [pair for rank in range(world) for pair in pairs(plan.batch(index, rank, world))] == whole


@settings(max_examples=60, deadline=None)
@given(SHAPE, st.data())
def test_access_in_any_order_gives_the_same_batches(shape, data):
    plan = make(shape)
    forward = [pairs(plan.batch(index)) for index in range(len(plan))]
    if forward:
        fresh = make(shape)
        for index in data.draw(st.lists(st.integers(0, len(plan) - 1), max_size=20)):
            assert pairs(fresh.batch(index)) == forward[index]


@settings(max_examples=60, deadline=None)
@given(SHAPE)
def test_a_canonical_node_reads_only_its_own_parts(shape):
    plan, nodes, window = make(shape), shape[3], shape[5]
    for order in plan.orders:
        parts_of = [set() for _ in range(nodes)]
        for index in range(order.batches):
            for node, parts in enumerate(parts_of):
                share = order.batch // nodes
                taken = order.take(index, node * share, (node + 1) * share)
                parts |= set(taken.parts.tolist())
        touched = sum(len(parts) for parts in parts_of)
        assert touched <= len(set().union(*parts_of)) + nodes - 1
        assert window >= 1


def test_only_the_parts_of_a_window_are_open_at_a_time():
    order = EpochPlan(3, 0, {"a": [16] * 64}, 8, 2, 4).orders[0]
    recent = [set(order.take(index, 0, 4).parts.tolist()) for index in range(order.batches)]
    for at in range(0, len(recent), 16):  # 64 rows of a window = 16 steps of 4 rows
        assert len(set().union(*recent[at : at + 16])) == 4


def test_parts_are_named_ahead_once_and_before_they_are_read():
    plan = EpochPlan(3, 0, {"a": [16] * 64, "b": [16] * 9}, 8, 2, 4)
    for world in (1, 2, 4):
        for rank in range(world):
            named, read, first_window = [], set(), {}
            for index in range(len(plan)):
                rows = plan.batch(index, rank, world)
                fresh = {(rows.bucket, part) for part in rows.parts.tolist()} - read
                late = fresh - set(named)
                first_window.setdefault(rows.bucket, set()).update(late)
                read |= fresh
                bucket, parts = plan.ahead(index, rank, world)
                named += [(bucket, part) for part in parts]
            assert len(named) == len(set(named)) or world == 1
            nodes = 2 if world == 1 else 1
            assert all(len(late) <= 4 * nodes for late in first_window.values())


def test_epochs_differ_and_leave_out_other_rows():
    def left(epoch):
        plan = EpochPlan(0, epoch, {"a": [10] * 10}, 8)
        seen = {pair for index in range(len(plan)) for pair in pairs(plan.batch(index))}
        return frozenset({(part, row) for part in range(10) for row in range(10)} - seen)

    assert len({left(epoch) for epoch in range(8)}) == 8


def test_buckets_mix_and_the_order_of_the_mapping_does_not_matter():
    sizes = {"a": [100] * 5, "b": [100] * 5}
    one, other = EpochPlan(1, 0, sizes, 10), EpochPlan(1, 0, dict(reversed(sizes.items())), 10)
    names = [one.batch(index).bucket for index in range(len(one))]
    assert names == [other.batch(index).bucket for index in range(len(other))]
    assert 20 < sum(left != right for left, right in itertools.pairwise(names)) < 80


def test_batch_sizes_may_differ_by_bucket():
    plan = EpochPlan(0, 0, {"a": [100], "b": [100]}, {"a": 10, "b": 4}, canonical_nodes=2)
    assert {plan.batch(index).bucket: len(plan.batch(index).rows) for index in range(len(plan))} == {
        "a": 10,
        "b": 4,
    }
    assert sum(len(plan.batch(index).rows) for index in range(len(plan))) == 200


def test_the_order_of_version_1_stays():
    """A run resumes under the order that it began with: if this fails on purpose, raise PLANNER."""
    plan = EpochPlan(7, 2, {"a": [5, 6, 7], "b": [9]}, 4, 2, 2)
    order = [(rows.bucket, pairs(rows)) for rows in map(plan.batch, range(len(plan)))]
    assert order == ORDER


@pytest.mark.parametrize(
    "bad", [{"global_batch": 0}, {"global_batch": 3, "canonical_nodes": 2}, {"shuffle_parts": 0}]
)
def test_out_of_range(bad):
    with pytest.raises(ValueError, match=r"multiple|below"):
        EpochPlan(
            **{
                "seed": 0,
                "epoch": 0,
                "buckets": {"a": [5]},
                "global_batch": 2,
                "canonical_nodes": 1,
                "shuffle_parts": 1,
                **bad,
            }
        )


def test_random_numbers_depend_on_each_key_alone():
    def draw(seed=1, epoch=2, id=3, stream="noise"):
        return sample_rng(seed, epoch, id, stream).standard_normal(4).tolist()

    assert draw() == draw()
    others = [draw(seed=2), draw(epoch=3), draw(id=4), draw(stream="caption"), draw(id=3 << 32)]
    assert len({tuple(values) for values in [draw(), *others]}) == 6
    together = np.concatenate([sample_rng(0, 0, id, "noise").standard_normal(64) for id in range(200)])
    assert abs(together.mean()) < 0.03
    assert abs(together.std() - 1) < 0.03


ORDER = [
    ("a", [(1, 0), (1, 2), (2, 6), (2, 0)]),
    ("b", [(0, 2), (0, 0), (0, 5), (0, 4)]),
    ("a", [(0, 1), (1, 1), (2, 2), (2, 4)]),
    ("a", [(0, 2), (0, 0), (2, 1), (2, 3)]),
    ("a", [(1, 4), (1, 5), (0, 3), (2, 5)]),
    ("b", [(0, 3), (0, 1), (0, 7), (0, 8)]),
]
