"""Rows of one image hand their captions to the row that stays, whichever source file they are in."""

import json

import pyarrow as pa
import pytest

from data_prep.config import DedupeConfig
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.captions import MAX_CAPTIONS
from data_prep.plan.copies import Copies
from data_prep.plan.plan import run_plan
from data_prep.plan.scan import CAPTIONS
from data_prep.store.store import open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.helpers.raw_material import (
    ALONE,
    all_pairs,
    config_of,
    png,
    prepare,
    reasons_of,
    sample_members,
    write_parquet,
    write_tar,
)


def captions_of(dataset):
    return {pair.key: [text for _, text in pair.captions] for pair in all_pairs(dataset)}


def test_rows_of_one_image_give_it_all_their_captions(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(2):
        (tmp_path / f"in/{n}.png").write_bytes(png(n))
    rows = [(n, f"{word} {n}") for n in range(2) for word in ("one", "two", "one", "three")]
    lines = [json.dumps({"file_name": f"{n}.png", "caption": caption}) for n, caption in rows]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "0.png", "caption": ""}']))
    captions = {
        pair.key: [text for _, text in pair.captions]
        for pair in all_pairs(prepare(config_of(tmp_path, ("folder", tmp_path / "in"))))
    }
    assert captions == {f"{n}.png": [f"one {n}", f"two {n}", f"three {n}"] for n in range(2)}


def test_rows_of_one_image_in_several_files_and_sources_give_it_all_their_captions(tmp_path):
    write_tar(tmp_path / "t", "a.tar", sample_members("a", png(1), {"caption": "one"}))
    more = [*sample_members("b", png(1), {"caption": "two"}), *sample_members("c", png(2), {"caption": "c"})]
    write_tar(tmp_path / "t", "b.tar", [*more, *sample_members("d", png(1), {"caption": "one"})])
    rows = [(1, ["three", "two"]), (3, ["p"]), (1, ["four"]), (2, ["c too"])]
    write_parquet(tmp_path / "p/a.parquet", [{"image": png(n), "caption": texts} for n, texts in rows])
    config = config_of(tmp_path, ("webdataset", tmp_path / "t"), ("parquet", tmp_path / "p"))
    expected = {"a": ["one", "two", "three", "four"], "c": ["c", "c too"], "a.parquet:1": ["p"]}

    dataset = prepare(config)
    assert captions_of(dataset) == expected
    assert reasons_of(dataset) == {"dedupe: same file": 5}

    # By any number of tasks, in any order.
    config.store = str(tmp_path / "other")
    shared = open_store(config.store, create=True).sub("ds")
    for index in (2, 0, 1):
        run_plan(config, shared, Share(index, 3))
    run_pairs(config, shared, ALONE)
    assert captions_of(shared) == expected


def test_without_the_search_for_duplicates_each_row_keeps_its_caption(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / "t", f"{name}.tar", sample_members(name, png(1), {"caption": name}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "t"), dedupe=DedupeConfig(exact=False))
    assert captions_of(prepare(config)) == {"a": ["a"], "b": ["b"]}


def rows_of(hashes, first=0, text="caption"):
    captions = [[{"kind": 0, "text": f"{text} {first + number}"}] for number in range(len(hashes))]
    return pa.table(
        {
            "id": pa.array(range(first, first + len(hashes)), pa.int64()),
            "hash": pa.array(hashes, pa.uint64()),
            "captions": pa.array(captions, CAPTIONS),
        }
    )


def test_hashes_of_64_bits_are_told_apart_and_captions_are_bounded(tmp_path):
    copies = Copies(tmp_path / "copies")
    copies.add(rows_of([2**64 - 1, 2**63, 1], 10))
    copies.add(rows_of([7] * (MAX_CAPTIONS + 5), 20))
    copies.complete()
    captions = copies.hand_over(rows_of([2**64 - 1, 2**63, 7, 5], text="own"), [0, 1, 2])["captions"]
    texts = [[entry["text"] for entry in row] for row in captions.to_pylist()]
    assert texts[:2] == [["own 0", "caption 10"], ["own 1", "caption 11"]]
    assert (len(texts[2]), texts[2][:2], texts[3]) == (MAX_CAPTIONS, ["own 2", "caption 20"], ["own 3"])
    copies.close()


def test_a_full_disk_is_named(tmp_path, full_disk):
    copies = Copies(tmp_path / "copies")
    copies.add(rows_of([1] * 10_000))
    with full_disk(1 << 16), pytest.raises(UserError, match=r"copies: .*free space there"):
        copies.complete()
