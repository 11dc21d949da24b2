"""A batch that a loader process reads: right bytes, picked captions, and errors that name the file."""

import gc
import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dataset.mds import Shard, write_mds
from data_prep.store.store import StoredFile, open_store
from model.common.errors import UserError
from pipeline.data import shard_cache
from pipeline.data.captions import CaptionChoice
from pipeline.data.shard_cache import ShardCache, locked
from tests.helpers import fake_snapshot as fake
from tests.helpers.fake_ranks import open_data

BUCKETS = {"64x64": [7, 5], "48x80": [6]}
CPU = torch.device("cpu")


def first_batches(stage, count):
    data = open_data(stage)
    batches = [batch for batch, _ in itertools.islice(data.batches(), count)]
    data.close()
    return batches


def test_every_byte_is_the_samples_own(store, tmp_path):
    for batch in first_batches(fake.stage(store, tmp_path, global_batch=3, caption_drop=0.3), 24):
        taken = dict.fromkeys(batch.texts, 0)
        for row, id in enumerate(batch.ids.tolist()):
            stored = fake.latents_row(id, batch.bucket)
            for name in ("mean", "std"):
                assert (
                    getattr(batch, name)[row].contiguous().view(torch.uint8).numpy().tobytes() == stored[name]
                )
            chosen = set()
            for name, packed in batch.texts.items():
                assert packed.counts == packed.lengths.tolist()
                text, length = fake.text_row(id, name), packed.counts[row]
                tokens = np.frombuffer(text["tokens"], "<i4")
                values = np.frombuffer(text["values"], np.uint8).reshape(-1, packed.values.shape[1])
                part = packed.values[taken[name] : taken[name] + length].numpy()
                starts = tokens.cumsum() - tokens
                fits = {
                    k
                    for k in range(len(tokens))
                    if np.array_equal(values[starts[k] : starts[k] + tokens[k]], part)
                }
                chosen = fits if not chosen else chosen & fits
                if not length:
                    assert not chosen
                elif len(packed.scales):
                    scales = np.frombuffer(text["scales"], "<f4")
                    at = int(starts[min(fits)])
                    assert np.array_equal(
                        packed.scales[taken[name] : taken[name] + length].numpy(), scales[at : at + length]
                    )
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
                seen[id] = (
                    batch.noise[row].sum().item(),
                    batch.posterior_noise[row].sum().item(),
                    batch.u[row].item(),
                    counts,
                )
        return seen

    one, other, reseeded = numbers(global_batch=2), numbers(global_batch=6), numbers(global_batch=6, seed=1)
    both = set(one) & set(other)
    assert both
    assert all(one[id] == other[id] for id in both)
    assert all(other[id][:3] != reseeded[id][:3] for id in set(other) & set(reseeded))
    assert all(0 <= value[2] < 1 and value[0] != value[1] for value in other.values())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.floats(0, 1), st.floats(0.01, 5))
def test_captions_are_picked_by_weight(kinds, drop, weight):
    choice = CaptionChoice(["a", "b", "c"], {"a": weight, "b": 1.0}, drop)
    rng = np.random.default_rng(0)
    picked = Counter(choice.pick(rng, np.array(kinds, np.uint8), True) for _ in range(3000))
    assert abs(picked[None] / 3000 - drop) < 0.05
    shares = {kind: {0: weight, 1: 1.0, 2: 0.0}[kind] for kind in set(kinds)}
    total = sum(shares.values())
    for index, kind in enumerate(kinds):
        share = shares[kind] / total / kinds.count(kind) if total else 1 / len(kinds)
        assert abs(picked[index] / 3000 - share * (1 - drop)) < 0.06


def test_all_captions_alike_without_weights_and_none_without_captions():
    choice = CaptionChoice(["a", "b"], {}, 0.0)
    rng = np.random.default_rng(0)
    picked = Counter(choice.pick(rng, np.array([0, 0, 1], np.uint8), True) for _ in range(3000))
    assert max(abs(picked[index] / 3000 - 1 / 3) for index in range(3)) < 0.04
    assert choice.pick(rng, np.array([], np.uint8), True) is None
    assert CaptionChoice(["a"], {}, 1.0).pick(rng, np.array([0], np.uint8), False) == 0


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


def test_streaming_dataset_reads_our_shards_and_we_read_its_writers(tmp_path, monkeypatch):
    """The shards are MDS: mosaicml's own StreamingDataset gives the rows that ours hold, and ours reads what
    its writer wrote."""
    from streaming import MDSWriter, StreamingDataset

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where it leaves files of locks
    columns = fake.TEXTS["small"].columns
    rows = [fake.text_row(id, "small") for id in range(20)]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with MDSWriter(out=str(theirs), columns=columns, size_limit=None) as writer:
        for row in rows:
            writer.write(row)
    fake.make(tmp_path / "store", {"64x64": [20]}, tmp_path)
    (part,) = (tmp_path / "store/ds/families/small").rglob("*.mds")
    ours.mkdir()
    shutil.copy(part, ours / "shard.00000.mds")
    # What StreamingDataset needs beside the file: an index, as its writer made it, but for the file's size.
    index = json.loads((theirs / "index.json").read_text())
    index["shards"][0]["raw_data"]["bytes"] = part.stat().st_size
    (ours / "index.json").write_text(json.dumps(index))
    for folder in (theirs, ours):
        path = folder / "shard.00000.mds"
        dataset = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
        assert [dataset[number] for number in range(len(dataset))] == rows
        shard = Shard(path, columns)
        assert list(shard) == rows
        assert len(shard) == len(rows)
        for number, row in enumerate(rows):
            assert shard.row(number).id == row["id"]
            assert all(shard.row(number).read(column) == row[column] for column in columns if column != "id")
        del dataset
        gc.collect()  # its shared memory


@pytest.mark.parametrize(("rows", "says"), [(5, "families disagree on rows"), (6, "hold other sample ids")])
def test_families_that_do_not_belong_together_are_not_joined(wrong_store, tmp_path, rows, says):
    with pytest.raises(UserError, match=rf"shard\.00000\.mds.*{says}"):
        first_batches(fake.stage(wrong_store(rows), tmp_path), 1)


def test_a_local_store_is_only_read(store_of_another, tmp_path):
    """Its files may belong to another user, who alone may set their times."""
    assert first_batches(fake.stage(store_of_another, tmp_path / "cache"), 2)


def test_columns_longer_than_the_first_read(tmp_path):
    row = {
        "id": 5,
        "kinds": bytes(9000),
        "scales": b"",
        "tokens": bytes(range(200)),
        "values": bytes(range(256)) * 100,
    }
    write_mds(tmp_path / "a.mds", fake.TEXTS["small"].columns, [row])
    shard = Shard(tmp_path / "a.mds", fake.TEXTS["small"].columns)
    assert {name: shard.row(0).read(name) for name in row if name != "id"} == {
        name: row[name] for name in row if name != "id"
    }
    with pytest.raises(UserError, match="has the columns"):
        Shard(tmp_path / "a.mds", fake.LATENTS.columns)


def test_a_lock_is_free_again_although_a_forked_process_has_its_file(tmp_path):
    with locked(tmp_path / "lock", 0.0) as is_held:
        assert is_held
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with locked(tmp_path / "lock", 0.0) as is_held:
            assert is_held
    finally:
        child.kill()
        child.join()


def test_a_lock_ends_with_its_holder(tmp_path):
    with locked(tmp_path / "lock", 0.0) as is_held:
        assert is_held
        with locked(tmp_path / "lock", 0.1) as second:
            assert not second
    with locked(tmp_path / "lock", 0.0) as is_held:
        assert is_held


def test_what_dead_processes_left_unfinished_is_removed_and_a_live_ones_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "LOCKS", 1 << 62)  # no two files share a lock
    store = open_store(str(tmp_path / "store"), create=True)
    caches = [ShardCache(store, tmp_path / "cache", snapshot, None) for snapshot in ("abc", "def")]
    suffixes = (
        "small/64x64/00007.mds.1f2e.part",
        "small/64x64/00007.mds.reserved",
        "small/64x64/00007.whole.part",
    )
    suffixes += ("index/64x64-ff.part",)
    paths = [cache.folder / suffix for cache in caches for suffix in suffixes]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    with caches[0].locked("small/64x64/00007", 0.0), caches[0].locked("index/64x64-ff", 0.0):
        caches[1].clean()
        assert [path.exists() for path in paths] == [True] * 4 + [False] * 4
    caches[1].clean()
    assert not any(path.exists() for path in paths)


def test_a_download_in_progress_keeps_its_bytes_and_a_finished_one_does_not(tmp_path):
    store = open_store(str(tmp_path / "store"), create=True)
    cache = ShardCache(store, tmp_path / "cache", "abc", limit=100)
    whole = cache.folder / "whole.mds"

    def remains():
        whole.write_bytes(bytes(40))
        with cache.reserve(cache.folder / "second.mds", 30):
            return whole.exists()

    with cache.reserve(cache.folder / "first.mds", 30):
        assert remains()
    with cache.reserve(cache.folder / "first.mds", 31):
        assert not remains()
    assert remains()
    assert not list(cache.folder.rglob("*.reserved"))


def test_a_download_that_ends_during_an_eviction_counts(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"), create=True)
    cache = ShardCache(store, tmp_path / "cache", "abc", limit=100)
    first = cache.folder / "first.mds"
    download = ExitStack()
    download.enter_context(cache.reserve(first, 60))
    files_under = shard_cache._files_under

    def ends_after_the_first_listing(*arguments):
        found = files_under(*arguments)
        first.write_bytes(bytes(60))
        download.close()
        monkeypatch.setattr(shard_cache, "_files_under", files_under)
        return found

    monkeypatch.setattr(shard_cache, "_files_under", ends_after_the_first_listing)
    with cache.reserve(cache.folder / "second.mds", 50):
        assert not first.exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "store"), create=True)
    with pytest.raises(UserError, match=r"data\.cache="):
        ShardCache(store, Path(tmp_path / "file" / "below"), "abc", None)


def test_a_file_that_is_evicted_as_soon_as_it_is_fetched_is_fetched_again(tmp_path, monkeypatch, remote_file):
    cache, file = remote_file
    download, gone = cache._download, [True, False]

    def evicted(path, *arguments):
        write = shard_cache.write_atomic
        if gone.pop(0):
            monkeypatch.setattr(shard_cache, "write_atomic", lambda *_: path.unlink() or path.stat())
        download(path, *arguments)
        monkeypatch.setattr(shard_cache, "write_atomic", write)

    monkeypatch.setattr(cache, "_download", evicted)
    path = cache.get(file, "small/64x64/00000", 1.0)
    assert not path.exists()
    assert cache.get(file, "small/64x64/00000", 1.0).read_bytes() == b"payload"


@pytest.fixture
def remote_file(s3, tmp_path):
    store = open_store(s3)
    store.put("payload", b"payload")
    file = StoredFile("payload", 7, xxhash.xxh64_hexdigest(b"payload"))
    yield ShardCache(store, tmp_path / "cache", "abc", None), file
    store.close()
