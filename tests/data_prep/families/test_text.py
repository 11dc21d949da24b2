import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.config import DatasetConfig
from data_prep.dataset.mds import Shard
from data_prep.dataset.parts import committed, read_commit
from data_prep.dataset.schema import TEXT_COLUMNS, Family
from data_prep.dataset.snapshot_reader import read_constants, read_family
from data_prep.families import text
from data_prep.families.text import (
    MAX_CACHE_BYTES,
    CaptionEncoder,
    calibration_captions,
    measure_channels,
    run_text,
)
from data_prep.families.text_report import print_text_report, text_reports
from data_prep.pairs.pairs import Pair, read_pairs
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from model.encoders.quantize import dequantize
from model.encoders.text_encoder import load_encoder
from model.encoders.token_size import BITS
from tests.helpers import fake_dataset, tiny_llm

CPU = torch.device("cpu")
DATASET = DatasetConfig(name="ds", caption_kinds=["original", "long"])


@pytest.fixture
def dataset(tmp_path):
    """Three parts of pairs in two buckets."""
    store = open_store(str(tmp_path / "store"), create=True).sub("ds")
    fake_dataset.plan(store, {"64x64": [20, 12], "64x80": [7]})
    fake_dataset.make_pairs(store)
    return store


@pytest.fixture
def llm(tmp_path):
    return tiny_llm.make(tmp_path / "llm", tiny_llm.llama, instruction="Describe: ")


def read_rows(dataset, name, tmp_path):
    for commit in committed(dataset, name).values():
        for file in commit.files:
            path = tmp_path / "part.mds"
            dataset.fetch(file, path)
            yield from Shard(path, TEXT_COLUMNS)


def pair(number, *captions):
    return Pair(number, f"k{number}", b"", list(captions), 64, 64)


def make_job(llm, cache_bytes=MAX_CACHE_BYTES, **settings):
    encoder = load_encoder(replace(llm, **settings), CPU)
    sample = encoder.encode(encoder.tokenize([f"a picture of {n} things" for n in range(40)]))
    mean, std = measure_channels(sample)
    constants = {"mean": mean, "spread": std}
    return CaptionEncoder(encoder, constants, DATASET.caption_kinds, cache_bytes), encoder


@pytest.mark.parametrize("quantisation", sorted(BITS))
def test_stored_states_are_those_of_the_llm(dataset, llm, tmp_path, quantisation):
    llm = replace(llm, quantisation=quantisation)
    for task in range(2):
        run_text(DATASET, llm, dataset, Share(task, 2))
    family = read_family(dataset, "tiny")
    constants = read_constants(dataset, family)
    encoder = load_encoder(llm, CPU)
    assert family.info == {
        "width": 48,
        "prefix_tokens": len(encoder.prefix_ids),
        "quantisation": quantisation,
    }
    mean, std = constants["mean"], constants["spread"]
    rows = list(read_rows(dataset, "tiny", tmp_path))
    assert len(rows) == 39
    for row in rows:
        (tokens,) = np.frombuffer(row["tokens"], np.int32)
        values = torch.frombuffer(bytearray(row["values"]), dtype=torch.uint8).view(tokens, -1)
        scales = (
            torch.frombuffer(bytearray(row["scales"]), dtype=torch.float32)
            if row["scales"]
            else torch.empty(0)
        )
        stored = dequantize(values, scales, quantisation, mean, std, torch.float32)
        (exact,) = encoder.encode(encoder.tokenize([f"caption {row['id']}"]))
        error = (stored - (exact - mean) / std).square().mean().sqrt()
        assert error < {"bf16": 0.02, "int8": 0.02, "int6": 0.06, "int4": 0.25}[quantisation]
    null = constants["null_states"]
    torch.testing.assert_close(null, encoder.encode(encoder.tokenize([""]))[0])
    torch.testing.assert_close(constants["prefix_states"], encoder.prefix_states())


def test_commits_count_what_was_saved(dataset, llm):
    run_text(DATASET, llm, dataset, Share())
    for commit in committed(dataset, "tiny").values():
        counts = commit.counts
        json.dumps(counts)
        assert counts["captions"] == commit.rows
        assert counts["bytes"] == counts["tokens"] * (48 + 4)
        assert counts["prefix_tokens_saved"] > 0
        assert counts["error_worst"] >= counts["error_mean"] > 0
        assert counts["error_worst"] < 0.05


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_the_report_adds_up_to_plain_encoding(dataset, llm, reuse_prefix, capsys):
    """The work that was run and the four savings add up to the work of whole prompts, padded in their
    order."""
    llm = replace(llm, reuse_prefix=reuse_prefix, max_tokens=12)
    for task in range(2):
        run_text(DATASET, llm, dataset, Share(task, 2))
        print_text_report(dataset, "tiny", Share(task, 2))
    assert capsys.readouterr().out.count("text family tiny: ") == 2
    (report,) = text_reports(dataset)
    encoder = load_encoder(llm, CPU)
    commits = committed(dataset, "tiny").values()
    run = sum(commit.counts["block_tokens_run"] for commit in commits)
    plain = 0
    for commit in commits:
        pairs = read_pairs(dataset, read_commit(dataset, "pairs", commit.part), DATASET.caption_kinds)
        ids = encoder.tokenize([caption for pair in pairs for _, caption in pair.captions])
        assert len(ids) < 64
        widest = max(map(len, ids)) * len(ids) if reuse_prefix else sum(map(len, ids))
        plain += 5 * (widest + len(encoder.prompt_ids) * len(ids))
    assert report.work == pytest.approx(run / plain)
    assert report.work + sum(report.saved.values()) == pytest.approx(1)
    assert (report.saved["prefix"] > 0.3) == reuse_prefix
    assert report.saved["layers"] > 0.1
    assert report.captions == 39
    assert report.truncated == encoder.truncated > 0
    assert report.bytes == sum(file.bytes for commit in commits for file in commit.files)
    assert report.bytes_per_caption > report.tokens / 39 * 52
    assert report.tokens_per_second > 0
    assert 0 < report.error_mean <= report.error_worst < 0.05


def test_a_second_run_does_nothing(dataset, llm):
    run_text(DATASET, llm, dataset, Share())
    before = {part: commit.attempt for part, commit in committed(dataset, "tiny").items()}
    run_text(DATASET, llm, dataset, Share())
    assert {part: commit.attempt for part, commit in committed(dataset, "tiny").items()} == before


@pytest.mark.parametrize(
    "change", [{"layer": "-2"}, {"suffix": "<eos>"}, {"max_tokens": 9}, {"quantisation": "int4"}]
)
def test_another_encoder_under_the_same_name_is_refused(dataset, llm, change):
    run_text(DATASET, llm, dataset, Share(0, 3))
    with pytest.raises(UserError, match=next(iter(change))):
        run_text(DATASET, replace(llm, **change), dataset, Share(1, 3))


def test_stored_prefix_states_are_checked(dataset, llm, monkeypatch):
    run_text(DATASET, llm, dataset, Share(0, 3))
    right = text.read_constants

    def altered(*arguments):
        constants = right(*arguments)
        constants["prefix_states"][1] *= 1.01
        return constants

    monkeypatch.setattr(text, "read_constants", altered)
    with pytest.raises(UserError, match="prefix states differ"):
        run_text(DATASET, llm, dataset, Share(1, 3))


def test_no_pairs_yet(tmp_path, llm):
    store = open_store(str(tmp_path / "store"), create=True).sub("ds")
    fake_dataset.plan(store, {"64x64": [4]})
    with pytest.raises(UserError, match="no captions yet"):
        run_text(DATASET, llm, store, Share())
    assert not store.exists(Family("tiny", "text", {}).key)


def test_calibration_is_a_fixed_sample_without_the_held_out(dataset):
    sample = calibration_captions(dataset)
    assert sample == calibration_captions(dataset)
    assert not any(text.is_held_out(caption) for caption in sample)
    assert 5 < len(sample) < 39


def test_captions_of_one_image_equal_ones_and_empty_ones(llm):
    job, encoder = make_job(llm)
    before = encoder.counts["captions_encoded"]
    rows, counts = job.encode_part(
        [
            pair(1, ("original", "a cat"), ("long", "a cat, sitting ")),
            pair(2, ("long", " a cat"), ("original", "")),
            pair(3),
        ]
    )
    assert encoder.counts["captions_encoded"] - before == 2
    assert [np.frombuffer(row["kinds"], np.uint8).tolist() for row in rows] == [[0, 1], [1, 0], []]
    short, long = (len(ids) for ids in encoder.tokenize(["a cat", "a cat, sitting"]))
    assert [np.frombuffer(row["tokens"], np.int32).tolist() for row in rows] == [
        [short, long],
        [short, 0],
        [],
    ]
    width = encoder.width
    assert rows[1]["values"] == rows[0]["values"][: short * width]
    assert rows[1]["scales"] == rows[0]["scales"][: short * 4]
    assert counts["duplicate_captions"] == 1
    assert counts["empty_captions"] == 1
    assert counts["duplicate_tokens_saved"] == short + len(encoder.prefix_ids)
    again, counts = job.encode_part([pair(9, ("original", "a cat"))])
    assert again[0]["values"] == rows[1]["values"]
    assert counts["captions_encoded"] == 0


class Waits(TorchDispatchMode):
    """Counts what a host would wait for a GPU for: values that it reads."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("quantisation", ["int8", "bf16"])
def test_a_chunk_is_stored_after_the_next_one_is_launched(llm, monkeypatch, quantisation):
    job, _ = make_job(llm, tokens_per_batch=16, quantisation=quantisation)
    captions = [pair(n, ("original", f"picture {n} " + "x" * (n % 7))) for n in range(60)]
    expected, counts = make_job(llm, quantisation=quantisation)[0].encode_part(captions)
    order, waits = [], Waits()

    def watched(name):
        real = getattr(job, name)

        def call(*arguments):
            order.append(name)
            with waits if name == "_launch" else nullcontext():
                return real(*arguments)

        monkeypatch.setattr(job, name, call)

    watched("_launch")
    watched("_store")
    rows, own = job.encode_part(captions)
    launches = order.count("_launch")
    assert launches >= 3
    assert order == ["_launch", *["_launch", "_store"] * (launches - 1), "_store"]
    assert waits.count == 0
    # Other batches round otherwise.
    kind, tolerance = (np.int8, 2) if quantisation == "int8" else (np.int16, 1 << 9)
    for row, other in zip(rows, expected, strict=True):
        assert row["tokens"] == other["tokens"]
        values = [np.frombuffer(each["values"], kind).astype(int) for each in (row, other)]
        assert np.median(abs(values[0] - values[1])) <= tolerance / 8
        assert len(values[0]) == len(values[1]) > 0
    assert own["error_mean"] == pytest.approx(counts["error_mean"], rel=0.1)


def test_the_cache_has_a_limit(llm):
    job, _ = make_job(llm, cache_bytes=2000, tokens_per_batch=16)
    whole = [pair(n, ("original", f"caption {n}")) for n in range(60)]
    rows, _ = job.encode_part(whole)
    assert job.cache.bytes <= 2000
    alone, _ = make_job(llm)[0].encode_part(whole)
    difference = np.frombuffer(b"".join(row["scales"] for row in rows), np.float32)
    np.testing.assert_allclose(
        difference, np.frombuffer(b"".join(row["scales"] for row in alone), np.float32), rtol=1e-4
    )


def test_unknown_kinds_and_bad_states_are_named(llm):
    job, encoder = make_job(llm)
    with pytest.raises(UserError, match="caption_kinds"):
        job.encode_part([pair(1, ("other", "a cat"))])
    with torch.no_grad():
        encoder.llm.module.embed_tokens.weight[:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        job.encode_part([pair(1, ("original", "a dog"))])


def test_a_constant_channel_stays_in_range():
    states = torch.randn(50, 8)
    states[:, 3] = 7.0
    mean, std = measure_channels([states[:20], states[20:]])
    torch.testing.assert_close(mean, states.mean(0))
    assert std[3] > 0
    torch.testing.assert_close(std[:3], states.std(0, correction=0)[:3])
