"""The same batches on any number of ranks and loader processes, from any position; and what is refused."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.data.position import Position
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import CPU, joined, open_data, read, summary, world_of

BUCKETS = {"64x64": [20, 13, 7, 11], "48x80": [9, 25], "80x48": [3]}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_worlds_see_the_same_global_batches(store, cache, world):
    """1x2, 1x4 and 2x4 processes against one; `test_batches` holds it for any plan and world."""
    stage = fake.stage(store, cache, global_batch=8, canonical_nodes=2)
    assert world_of(stage, world, 12) == world_of(stage, 1, 12)


def test_64_processes_on_8_nodes_see_the_same_global_batches(tmp_path):
    fake.make(tmp_path / "store", {"64x64": [40] * 6}, tmp_path, families=[fake.LATENTS, fake.TEXTS["small"]])
    stage = fake.stage(tmp_path / "store", tmp_path, global_batch=64, canonical_nodes=8, families=["small"])
    assert world_of(stage, 64, 3) == world_of(stage, 1, 3)


@pytest.mark.parametrize("workers", [1, 4])
def test_loader_processes_change_nothing(store, cache, workers):
    batches, positions = read(fake.stage(store, cache), 40)
    stage = fake.stage(store, cache, workers=workers)
    assert read(stage, 40) == (batches, positions)
    assert read(stage, 27, positions[12]) == (batches[13:], positions[13:]), "nor after a resume"
    assert {batch[1] for batch in batches} == {0, 1}, "an epoch ended in between"


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_stop_and_resume_anywhere_in_another_world(store, cache, stop, before, after):
    stage = fake.stage(store, cache, global_batch=8, canonical_nodes=2, shuffle_parts=2)
    whole = world_of(stage, 1, stop + 6)
    position = read(stage, stop, None, 0, before)[1][-1]
    position = Position.from_dict(position.to_dict())
    assert world_of(stage, before, stop) + world_of(stage, after, 6, position) == whole


def test_each_sample_once_an_epoch(store, cache):
    stage = fake.stage(store, cache, global_batch=4)
    data = open_data(stage)
    seen = [
        id
        for batch, _ in itertools.islice(data.batches(), len(data.schedule.plan(0)))
        for id in batch.ids.tolist()
    ]
    everything = {id for part, ids in fake.ids_of(BUCKETS).items() for id in ids if part.bucket != "80x48"}
    assert len(set(seen)) == len(seen)
    assert set(seen) <= everything
    assert len(everything) - len(seen) == sum(data.schedule.plan(0).left_over().values())


def test_small_buckets_are_left_out_and_reported(store, cache, caplog):
    data = open_data(fake.stage(store, cache, global_batch=4))
    assert set(data.schedule.parts[0]) == {"64x64", "48x80"}
    assert "80x48 is left out: its 3 samples" in caplog.text
    with pytest.raises(UserError, match="no bucket of ds has as many samples: lower global_batch"):
        open_data(fake.stage(store, cache, global_batch=64))


@pytest.mark.parametrize(
    "change", [{"global_batch": 8}, {"seed": 1}, {"canonical_nodes": 2}, {"shuffle_parts": 3}]
)
def test_another_order_inside_an_epoch_is_refused(store, cache, change):
    position = read(fake.stage(store, cache), 3)[1][-1]
    data = open_data(fake.stage(store, cache, **change))
    (key,) = change
    with pytest.raises(UserError, match=rf"{key} was \d+ and is \d+"):
        next(data.batches(position))
    position.batch = 0
    assert next(data.batches(position))[1].batch == 1


BUDGET = {"global_batch": 12, "tokens_per_batch": 700, "batch_multiple": 4}
"""64x64 has 8x8 latents, so 8 samples per batch; 32x32 and 32x64 have less than half of that, so all 12."""


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sized")
    fake.make(folder / "store", {"64x64": [20, 13], "32x32": [25, 5], "32x64": [40]}, folder)
    return folder / "store"


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_batches_by_a_token_budget_on_any_number_of_processes(sized, cache, stop, before, after):
    stage = fake.stage(sized, cache, **BUDGET)
    whole = world_of(stage, 1, stop + 4)
    assert {(step[0], len(step[3])) for step in world_of(stage, 1, 12)} == {
        ("64x64", 8),
        ("32x32", 12),
        ("32x64", 12),
    }
    position = read(stage, stop, None, 0, before)[1][-1]
    assert world_of(stage, before, stop) + world_of(stage, after, 4, position) == whole


def test_what_does_not_fit_a_token_budget_is_one_line(sized, cache):
    with pytest.raises(UserError, match="no batch of bucket 32x64 fits"):
        open_data(fake.stage(sized, cache, **{**BUDGET, "tokens_per_batch": 100}))
    with pytest.raises(
        UserError, match="10 samples per batch of bucket 64x64 are not a multiple of 3 processes"
    ):
        open_data(fake.stage(sized, cache, **{**BUDGET, "batch_multiple": 1}), 0, 3, CPU)
    position = read(fake.stage(sized, cache, **BUDGET), 3)[1][-1]
    for change, text in (
        ({"tokens_per_batch": None}, "was 700 and is None"),
        ({"tokens_per_batch": 1000}, "was 700 and is 1000"),
    ):
        with pytest.raises(UserError, match=f"tokens_per_batch {text}"):
            next(open_data(fake.stage(sized, cache, **{**BUDGET, **change})).batches(position))


def test_another_snapshot_inside_an_epoch_is_refused(store, cache):
    position = read(fake.stage(store, cache), 3)[1][-1]
    position.snapshot = "0123456789abcdef"
    with pytest.raises(UserError, match="snapshot was 0123456789abcdef and is"):
        next(open_data(fake.stage(store, cache)).batches(position))


def test_validation_is_fixed_and_apart_from_training(store, cache):
    def held_out(rank=0, world=1, **settings):
        data = open_data(fake.stage(store, cache, validation_parts=2, **settings), rank, world)
        return data, [summary(batch) for batch in data.validation()]

    data, batches = held_out()
    assert held_out(seed=5, caption_drop=1.0)[1] == batches
    assert [id for batch in batches for id in batch[3]] == [(1 << 32) + 33 + row for row in range(16)]
    assert joined([held_out(rank, 2)[1] for rank in range(2)]) == joined([batches])
    assert len(held_out(global_batch=30)[1][0][3]) == 18
    trained = {id for batch, _ in itertools.islice(data.batches(), 60) for id in batch.ids.tolist()}
    assert not trained & {id for batch in batches for id in batch[3]}
    assert not list(open_data(fake.stage(store, cache)).validation())
    with pytest.raises(UserError, match="hold out fewer"):
        open_data(fake.stage(store, cache, validation_parts=4))


def test_one_line_for_what_the_user_can_put_right(store, cache, tmp_path):
    cases = {
        "does not exist": fake.stage(tmp_path / "nowhere", cache),
        "no snapshot": fake.stage(store, cache, dataset="other"),
        "`0000`": fake.stage(store, cache, snapshot="0000"),
        "no text family `absent`": fake.stage(store, cache, families=["small", "absent"]),
        "no latents family `absent`": fake.stage(store, cache, latents="absent"),
        "caption_weights": fake.stage(store, cache, caption_weights={"alt": 1.0}),
    }
    for text, stage in cases.items():
        with pytest.raises(UserError) as caught:
            open_data(stage)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"4 samples per batch of bucket 48x80 are not a multiple of 3 processes"
    ):
        open_data(fake.stage(store, cache), 0, 3, CPU)
