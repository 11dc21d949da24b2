"""What a loader process makes of the files: right bytes, drawn captions, and errors that name the file."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.mds import read_mds, write_mds
from data_prep.store import open_store
from model.errors import UserError
from pipeline.dataset import CaptionChoice
from pipeline.loader import TrainingData
from pipeline.packing import draw_noise
from pipeline.shard_cache import Shard, ShardCache, locked
from tests.pipeline import fake_snapshot as fake

BUCKETS = {"64x64": [7, 5], "48x80": [6]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    fake.make(folder / "store", BUCKETS, folder)
    return folder / "store"


def first_batches(stage, count):
    data = TrainingData(stage, 0, 1, CPU)
    batches = [batch for batch, _ in itertools.islice(data.batches(), count)]
    data.close()
    return batches


def test_every_byte_is_the_samples_own(store, tmp_path):
    for batch in first_batches(fake.stage(store, tmp_path, global_batch=3, caption_drop=0.3), 24):
        taken = dict.fromkeys(batch.texts, 0)
        for row, id in enumerate(batch.ids.tolist()):
            stored = fake.latents_row(id, batch.bucket)
            for name in ("mean", "std"):
                assert getattr(batch, name)[row].contiguous().view(torch.uint8).numpy().tobytes() == stored[name]
            chosen = set()
            for name, packed in batch.texts.items():
                assert packed.counts == packed.lengths.tolist()
                text, length = fake.text_row(id, name), packed.counts[row]
                tokens = np.frombuffer(text["tokens"], "<i4")
                values = np.frombuffer(text["values"], np.uint8).reshape(-1, packed.values.shape[1])
                part = packed.values[taken[name] : taken[name] + length].numpy()
                starts = tokens.cumsum() - tokens
                fits = {k for k in range(len(tokens)) if np.array_equal(values[starts[k] : starts[k] + tokens[k]], part)}
                chosen = fits if not chosen else chosen & fits
                if not length:
                    assert not chosen
                elif len(packed.scales):
                    scales = np.frombuffer(text["scales"], "<f4")
                    at = int(starts[min(fits)])
                    assert np.array_equal(packed.scales[taken[name] : taken[name] + length].numpy(), scales[at : at + length])
                taken[name] += length
            counts = {bool(packed.counts[row]) for packed in batch.texts.values()}
            assert len(counts) == 1, "a caption is dropped in all families or in none"
            assert chosen or counts == {False}, "all families give the same caption"


def test_randomness_is_the_samples_own(store, tmp_path):
    def numbers(**settings):
        seen = {}
        for batch in first_batches(fake.stage(store, tmp_path, **settings), 3):
            for row, id in enumerate(batch.ids.tolist()):
                counts = tuple(packed.counts[row] for packed in batch.texts.values())
                seen[id] = (batch.noise[row].sum().item(), batch.posterior_noise[row].sum().item(), batch.u[row].item(), counts)
        return seen

    one, other, reseeded = numbers(global_batch=2), numbers(global_batch=6), numbers(global_batch=6, seed=1)
    both = set(one) & set(other)
    assert both
    assert all(one[id] == other[id] for id in both)
    assert all(other[id][:3] != reseeded[id][:3] for id in set(other) & set(reseeded))
    assert all(0 <= value[2] < 1 and value[0] != value[1] for value in other.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.floats(0, 1), st.floats(0.01, 5))
def test_captions_are_drawn_by_weight(kinds, drop, weight):
    choice = CaptionChoice(["a", "b", "c"], {"a": weight, "b": 1.0}, drop)
    rng = np.random.default_rng(0)
    drawn = Counter(choice.draw(rng, np.array(kinds, np.uint8), True) for _ in range(3000))
    assert abs(drawn[None] / 3000 - drop) < 0.05
    shares = {kind: {0: weight, 1: 1.0, 2: 0.0}[kind] for kind in set(kinds)}
    total = sum(shares.values())
    for index, kind in enumerate(kinds):
        share = shares[kind] / total / kinds.count(kind) if total else 1 / len(kinds)
        assert abs(drawn[index] / 3000 - share * (1 - drop)) < 0.06


def test_all_captions_alike_without_weights_and_none_without_captions():
    choice = CaptionChoice(["a", "b"], {}, 0.0)
    rng = np.random.default_rng(0)
    drawn = Counter(choice.draw(rng, np.array([0, 0, 1], np.uint8), True) for _ in range(3000))
    assert max(abs(drawn[index] / 3000 - 1 / 3) for index in range(3)) < 0.04
    assert choice.draw(rng, np.array([], np.uint8), True) is None
    assert CaptionChoice(["a"], {}, 1.0).draw(rng, np.array([0], np.uint8), False) == 0


@pytest.mark.parametrize(("weights", "text"), [({"a": 0.0}, "above 0"), ({"a": -1.0}, "negative")])
def test_wrong_weights(weights, text):
    with pytest.raises(UserError, match=text):
        CaptionChoice(["a", "b"], weights, 0.1)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-5] ^= 0xFF
        path.write_bytes(bytes(data))
    elif how == "cut":
        path.write_bytes(bytes(data[:-9]))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_local_file_is_an_error_every_time(tmp_path, how, workers):
    fake.make(tmp_path / "store", {"64x64": [6]}, tmp_path, families=[fake.LATENTS, fake.TEXTS["small"]])
    stage = fake.stage(tmp_path / "store", tmp_path / "cache", families=["small"], workers=workers)
    assert first_batches(stage, 2)
    (path,) = (tmp_path / "store/ds/families/small").rglob("*.mds")
    damage(path, how)
    for _ in range(2):
        with pytest.raises(UserError, match=r"shard\.00000\.mds: is (damaged|missing)") as caught:
            first_batches(stage, 2)
        assert "\n" not in str(caught.value)


def test_reading_with_mosaicml_streaming_gives_the_same(tmp_path):
    """The shards are MDS: streaming's own reader decodes them alike, and ours reads what its writer wrote."""
    from streaming import MDSWriter
    from streaming.base.format.mds.reader import FileInfo, MDSReader

    columns = fake.TEXTS["small"].columns
    rows = [fake.text_row(id, "small") for id in range(20)]
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=None) as writer:
        for row in rows:
            writer.write(row)
    write_mds(tmp_path / "ours.mds", columns, rows)
    names = sorted(columns)
    sizes = [8 if columns[name] == "int" else None for name in names]
    encodings = [columns[name] for name in names]
    for name in ("shard.00000.mds", "ours.mds"):
        path = tmp_path / name
        info = FileInfo(name, path.stat().st_size, {})
        theirs = MDSReader(str(tmp_path), None, encodings, names, sizes, None, [], info, len(rows), None, None)
        shard = Shard(path, columns)
        assert list(read_mds(path, columns)) == rows
        assert [theirs[index] for index in range(20)] == rows
        for index, row in enumerate(rows):
            ours = shard.row(index)
            assert ours.id == row["id"]
            assert all(ours.read(column) == row[column] for column in columns if column != "id")


def test_columns_longer_than_the_first_read(tmp_path):
    row = {"id": 5, "kinds": bytes(9000), "scales": b"", "tokens": bytes(range(200)), "values": bytes(range(256)) * 100}
    write_mds(tmp_path / "a.mds", fake.TEXTS["small"].columns, [row])
    shard = Shard(tmp_path / "a.mds", fake.TEXTS["small"].columns)
    assert {name: shard.row(0).read(name) for name in row if name != "id"} == {name: row[name] for name in row if name != "id"}
    with pytest.raises(UserError, match="has columns"):
        Shard(tmp_path / "a.mds", fake.LATENTS.columns)


def test_a_lock_ends_with_its_holder(tmp_path):
    with locked(tmp_path / "lock", 0.0) as held:
        assert held
        with locked(tmp_path / "lock", 0.1) as second:
            assert not second
    with locked(tmp_path / "lock", 0.0) as held:
        assert held


def test_abandoned_downloads_are_removed_live_ones_are_not(tmp_path):
    import os

    store = open_store(str(tmp_path / "store"), create=True)
    cache = ShardCache(store, tmp_path / "cache", "abc", None)
    old, live = cache.folder / "a.mds.1234.part", cache.folder / "b.mds.1234.part"
    for path in (old, live):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    cache.clean()
    assert not old.exists()
    assert live.exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "store"), create=True)
    with pytest.raises(UserError, match=r"data\.cache="):
        ShardCache(store, Path(tmp_path / "file" / "below"), "abc", None)


def test_noise_is_the_samples_own():
    def noise(ids, seed=1, epoch=2, stream="noise"):
        drawn = draw_noise(CPU, [len(ids), 2, 8, 8], [(seed, epoch, id) for id in ids], stream)
        return dict(zip(ids, drawn, strict=True))

    one, other = noise([3, 4, 5]), noise([5, 3])
    assert all(torch.equal(one[id], other[id]) for id in other)
    variants = [one[3], one[4], noise([3], seed=2)[3], noise([3], epoch=3)[3], noise([3], stream="posterior_noise")[3]]
    assert len({values.sum().item() for values in variants}) == len(variants)
    numbers = torch.stack(list(noise(list(range(100))).values()))
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
