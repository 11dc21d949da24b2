"""Several datasets by weight: exact shares, whole passes, and the same batches on any number of processes."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.dataset.schema import Family
from model.common.errors import UserError
from model.encoders.quantize import quantize
from pipeline.data.epoch_plan import EpochPlan
from pipeline.data.mixture import Mixture
from pipeline.data.position import Position
from pipeline.stage.config import DatasetShare, StageConfig
from pipeline.stage.corpus import resolve
from pipeline.text.texts import PackedText, TextConstants, to_text
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import open_data, read, world_of

LARGE, SMALL = {"64x64": [20, 13, 7], "48x80": [9, 25]}, {"64x64": [5, 6], "32x32": [8]}
PARTS = st.lists(st.integers(1, 30), min_size=1, max_size=6)
DATASET = st.dictionaries(st.sampled_from(["a", "b", "c"]), PARTS, min_size=1)
WEIGHTS = st.floats(0.05, 5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    fake.make(folder / "store", LARGE, folder)
    fake.make(folder / "store", SMALL, folder, name="small")
    return folder / "store"


def mixed(store, cache, weights=(1.0, 1.0), **change):
    datasets = {name: DatasetShare(weight) for name, weight in zip(("ds", "small"), weights, strict=True)}
    return fake.stage(store, cache, dataset="", datasets=datasets, **change)


def pieces_of(mixture, epoch):
    """(bucket, source, pass, part, row) of all that an epoch reads."""
    return [
        (bucket, int(source), int(turn), int(part), int(first) + row)
        for bucket, piece in mixture.epoch(epoch).items()
        for source, turn, part, first, rows in zip(*vars(piece).values(), strict=True)
        for row in range(rows)
    ]


@settings(max_examples=60, deadline=None)
@example([({"a": [1]}, 4.0), ({"a": [1]}, 0.05), ({"a": [1], "b": [1], "c": [2]}, 1.0)])
@given(st.lists(st.tuples(DATASET, WEIGHTS), min_size=2, max_size=3))
def test_shares_are_exact_and_passes_whole(datasets):
    sizes = [{bucket: np.array(rows) for bucket, rows in dataset.items()} for dataset, _ in datasets]
    weights = [weight for _, weight in datasets]
    mixture, seen, epochs = Mixture(sizes, weights), Counter(), 2
    for epoch in range(epochs):
        read = pieces_of(mixture, epoch)
        seen.update(read)
        picked = Counter(source for _, source, *_ in read)
        for source, (dataset, weight) in enumerate(datasets):
            share = weight / sum(weights)
            # Each dataset's rows in a bucket are rounded, so the length of the epoch is too.
            rounded = len(dataset) + share * sum(len(each) for each, _ in datasets)
            assert abs(picked[source] - len(read) * share) <= rounded + 2 * len(read) / 1e6
            assert picked[source] >= sum(map(sum, dataset.values())), (
                "none has rows that an epoch does not reach"
            )
    assert set(seen.values()) == {1}, "no row twice in one pass"
    for source, (dataset, _) in enumerate(datasets):
        for bucket, parts in dataset.items():
            passes = Counter(turn for name, number, turn, *_ in seen if (name, number) == (bucket, source))
            whole = int(sum(parts) * mixture.passes[source] * epochs) // sum(parts)
            assert all(passes[turn] == sum(parts) for turn in range(whole))
            assert set(passes) <= set(range(whole + 1))


def test_datasets_are_spread_evenly_and_pass_follows_pass():
    mixture = Mixture([{"a": np.full(90, 10)}, {"a": np.full(5, 10)}], [0.75, 0.25])
    pieces = mixture.epoch(0)["a"]
    plan = EpochPlan(3, 0, {"a": pieces.rows}, 20, 1, 8, {"a": (pieces.sources, pieces.passes)})
    picked = [pieces.pick(plan.batch(index)) for index in range(len(plan))]
    shares = [
        np.concatenate([rows.sources for rows in picked[at : at + 4]]).mean()
        for at in range(0, len(picked), 4)
    ]
    assert all(abs(share - 0.25) < 0.1 for share in shares), "in each window of 8 parts"
    turns = np.concatenate([rows.passes[rows.sources == 1] for rows in picked])
    assert set(turns.tolist()) == set(range(6))
    assert np.corrcoef(turns, np.arange(len(turns)))[0, 1] > 0.95


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_stop_and_resume_anywhere_in_another_world(store, cache, stop, before, after):
    stage = mixed(store, cache, (1.0, 3.0), global_batch=8, canonical_nodes=2, shuffle_parts=2)
    whole = world_of(stage, 1, stop + 4)
    position = Position.from_dict(read(stage, stop, None, 0, before)[1][-1].to_dict())
    assert world_of(stage, before, stop) + world_of(stage, after, 4, position) == whole


def test_loader_processes_change_nothing(store, cache):
    alone = read(mixed(store, cache), 40)
    assert read(mixed(store, cache, workers=1), 40) == alone
    assert {batch[1] for batch in alone[0]} == {0, 1}, "an epoch ended in between"


def test_samples_of_an_epoch(store, cache):
    """Shares as weighed, bytes as stored, and other random numbers in each dataset and each pass."""
    data = open_data(mixed(store, cache, (0.4, 0.6)))
    noise, picked = {}, Counter()
    for batch, _ in itertools.islice(data.batches(), len(data.schedule.plan(0))):
        for row, (source, turn, id) in enumerate(
            zip(*map(torch.Tensor.tolist, (batch.sources, batch.passes, batch.ids)), strict=True)
        ):
            picked[source] += 1
            assert (source, turn, id) not in noise, "a sample is picked once per pass"
            noise[source, turn, id] = batch.noise[row].sum().item()
            stored = fake.latents_row(id, batch.bucket)
            assert batch.mean[row].contiguous().view(torch.uint8).numpy().tobytes() == stored["mean"]
    left = sum(data.schedule.plan(0).left_over().values())
    assert abs(picked[1] - 0.6 * picked.total()) <= left + 4
    assert {turn for source, turn, _ in noise if source == 0} == {0}
    assert {turn for source, turn, _ in noise if source == 1} > {0, 1, 2}
    assert len(set(noise.values())) == len(noise)
    data.close()


def test_states_of_all_datasets_are_standardised_alike():
    """A network must not see from which dataset a caption comes."""
    torch.manual_seed(0)
    raw = torch.randn(2, 5, 16) * 3 + 1
    for quantisation, tolerance in (("int8", 0.05), ("bf16", 0.02)):
        constants = [
            TextConstants(
                torch.zeros(1, 16),
                torch.zeros(1, 16),
                torch.randn(16),
                torch.rand(16) + 0.5,
                quantisation,
                16,
            )
            for _ in range(2)
        ]
        stored = [
            quantize(states, quantisation, c.mean, c.std)[:2]
            for states, c in zip(raw, constants, strict=True)
        ]
        values, scales = (torch.cat(parts) for parts in zip(*stored, strict=True))
        packed = PackedText(
            values, scales, torch.tensor([5, 5], dtype=torch.int32), None, torch.tensor([0, 1])
        )
        text = to_text(packed, constants[0].for_all(constants[1:]), torch.float32)
        expected = (raw - constants[0].mean) / constants[0].std
        torch.testing.assert_close(text.states[:, 1:], expected, atol=tolerance * 3, rtol=tolerance)
        assert constants[0].for_all([constants[0]]).rescale is None


def test_held_out_rows_come_from_each_dataset(store, cache):
    data = open_data(mixed(store, cache, validation_parts=1))
    assert {int(batch.sources[0]) for batch in data.validation()} == {0, 1}
    held_out = {(int(batch.sources[0]), id) for batch in data.validation() for id in batch.ids.tolist()}
    trained = {
        pair
        for batch, _ in itertools.islice(data.batches(), 60)
        for pair in zip(batch.sources.tolist(), batch.ids.tolist(), strict=True)
    }
    assert not held_out & trained
    data.close()


def test_another_mixture_inside_an_epoch_is_refused(store, cache):
    position = read(mixed(store, cache), 3)[1][-1]
    for stage in (mixed(store, cache, (1.0, 2.0)), fake.stage(store, cache)):
        with pytest.raises(UserError, match=r"snapshot was 1 ds@.* and is"):
            next(open_data(stage).batches(position))


def test_a_mixture_names_its_snapshots(store, cache):
    stage, corpus = resolve(mixed(store, cache, (1.0, 3.0)))
    ids = [source.snapshot.id for source in corpus.sources]
    assert [share.snapshot for share in stage.data.datasets.values()] == ids
    assert str(corpus) == f"0.25 x snapshot {ids[0]} of ds, 0.75 x snapshot {ids[1]} of small"
    assert corpus.rows == {"64x64": 51, "48x80": 34, "32x32": 8}
    assert resolve(stage)[1].id == corpus.id


def test_families_made_in_another_way_do_not_mix(store, cache, tmp_path):
    other = Family("small", "text", {"llm": "another"}, fake.TEXTS["small"].info)
    fake.make(tmp_path / "store", SMALL, tmp_path, [fake.LATENTS, other], name="small")
    stage = mixed(store, cache, families=["small"])
    stage.data.datasets["small"].store = str(tmp_path / "store")
    with pytest.raises(
        UserError, match=r"family `small` was made in one way in ds .* and in another in small"
    ):
        open_data(stage)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"dataset": "c"}, r"replaces data\.dataset"),
        ({"snapshot": "0123"}, r"replaces data\.dataset"),
        ({"datasets": {"a": DatasetShare()}}, "names a alone"),
        ({"datasets": {"a": DatasetShare(), "b": DatasetShare(0.0)}}, r"data\.datasets\.b\.weight=0"),
    ],
)
def test_what_contradicts_is_one_line(data, text):
    stage = StageConfig(name="x")
    stage.data.datasets = {"a": DatasetShare(), "b": DatasetShare()}
    for name, value in data.items():
        setattr(stage.data, name, value)
    with pytest.raises(UserError, match=text):
        StageConfig(name="x", data=stage.data)
