"""Source files that tasks scan in pieces give the bytes of files that one task scans whole."""

import json
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import SourceConfig
from data_prep.dataset.schema import Manifest
from data_prep.plan import pieces, scan_tables
from data_prep.plan.plan import run_plan
from data_prep.plan.scan_tables import scan_key
from data_prep.sources.folder import FolderSource
from data_prep.sources.parquet import ParquetSource
from data_prep.store.store import Store, StoreError, open_store
from model.common.errors import UserError
from model.common.share import Share
from tests.data_prep.plan.test_finish import Killed, KilledError
from tests.data_prep.plan.test_plan import IMAGES
from tests.helpers.raw_material import ALONE, config_of, write_parquet

FORMS = ("bytes", "paths", "jsonl", "csv", "images")


def write_source(folder, form, images, group):
    """Write a source in which one file has a row per entry of `images`, and return its entry of `sources`."""
    (folder / "x").mkdir(parents=True)
    names = []
    for number, image in enumerate(images):
        names.append(f"x/{number:02d}.png")
        if form != "bytes":
            (folder / names[-1]).write_bytes(IMAGES[image])
    rows = [{"image": name, "file_name": name, "caption": f"number {name}"} for name in names]
    if form in ("bytes", "paths"):
        if form == "bytes":
            rows = [{**row, "image": IMAGES[image]} for row, image in zip(rows, images, strict=True)]
        write_parquet(folder / "a.parquet", rows, group)
        return "parquet", folder
    if form == "jsonl":
        # The last image has no row, and some lines are damaged.
        lines = [json.dumps(row) for row in rows[:-1]]
        (folder / "metadata.jsonl").write_text("\nno json\n".join(lines))
    elif form == "csv":
        lines = [f"{row['file_name']},{row['caption']}" for row in rows]
        (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines, "absent.png,none"]))
    else:
        for row in rows:
            (folder / row["image"]).with_suffix(".txt").write_text(row["caption"])
    return "folder", folder


def all_objects(dataset):
    """Return all objects but the records of pieces, which are the only difference."""
    return {key: dataset.read(key) for key in dataset.list("") if not key.endswith("/cuts.json")}


def planned(config, store, tasks=1):
    dataset = open_store(str(store), create=True).sub("ds")
    with suppress(UserError):
        for _ in range(2):
            for task in range(tasks):
                run_plan(config, dataset, Share(task, tasks))
    return all_objects(dataset)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FORMS),
            st.lists(st.integers(0, len(IMAGES) - 1), min_size=1, max_size=9),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 5),
    st.none() | st.integers(1, 8),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 25), st.booleans()), max_size=4),
    st.booleans(),
)
def test_tasks_killed_anywhere_write_the_bytes_of_whole_files(
    tmp_path_factory, files, rows, limit, tasks, kills, is_set
):
    folder = tmp_path_factory.mktemp("pieces")
    sources = []
    for number, file in enumerate(files):
        sources.append(write_source(folder / f"in{number}", *file))
    config = config_of(folder, *sources)
    for source in config.sources:
        source.limit = limit
    if is_set:
        config.dedupe.against = [SourceConfig("folder", str(folder / "in0"))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_tables, "BATCH_ROWS", 4)
        whole = planned(config, folder / "whole")
        patch.setattr(pieces, "PIECE_ROWS", rows)
        for task, writes, after in kills:
            store = Store(Killed(folder / "cut", writes, after), "ds/")
            with suppress(KilledError, UserError):
                run_plan(config, store, Share(task % tasks, tasks))
        assert planned(config, folder / "cut", tasks) == whole


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_pieces_are_the_rows_of_the_file(tmp_path, form):
    kind, path = write_source(tmp_path / "in", form, list(range(9)) * 2, 4)
    source = {"parquet": ParquetSource, "folder": FolderSource}[kind](SourceConfig(kind, str(path)))
    name = source.inventory().names[0]
    whole = list(source.read(name, ["caption"]))
    for rows in (1, 3, 5, 100):
        ends = source.cuts(name, rows)
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        # Bytes are cut between row groups only.
        assert all(0 < size <= (max(rows, 4) if form == "bytes" else rows) for size in sizes)
        assert ends[-1:] == ([len(whole)] if rows < 100 else [])
        read = []
        for start, end in zip([0, *ends], ends, strict=False):
            read += source.read_rows(name, ["caption"], start, end)
        assert read == (whole if ends else [])


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """Settings of a file of paths in five pieces, and its dataset."""
    monkeypatch.setattr(pieces, "PIECE_ROWS", 2)
    config = config_of(tmp_path, write_source(tmp_path / "in", "paths", [0, 1, 2, 3, 4, 5, 6, 7, 0], 9))
    return config, open_store(config.store, create=True).sub("ds")


def test_one_file_is_shared_by_tasks_and_resumed_by_piece(cut, capsys):
    config, dataset = cut
    assert run_plan(config, dataset, Share(1, 3)) is None
    assert "3 of 5 source files or pieces of them are not scanned yet (tasks 0, 2)" in capsys.readouterr().out
    assert [key[-7:] for key in dataset.list("scan/pieces/")] == ["1.parquet"[-7:], "2.parquet"[-7:]]
    first = dataset.read("scan/pieces/00000000/000001.parquet")
    assert pq.read_table(pa.BufferReader(first))["id"].to_pylist() == [2, 3]
    run_plan(config, dataset, Share(0, 3))
    assert not dataset.exists(scan_key(0))
    assert run_plan(config, dataset, Share(2, 3)) is not None
    assert not list(dataset.list("scan/pieces/"))


def test_a_file_that_has_changed_since_it_was_cut_is_scanned_whole(cut, tmp_path, capsys):
    config, dataset = cut
    assert run_plan(config, dataset, Share(0, 5)) is None
    rows = [{"image": f"x/{number:02d}.png", "caption": f"new {number}"} for number in (7, 2, 1)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    assert run_plan(config, dataset, Share(3, 5)) is not None
    assert "have changed since they were listed" in capsys.readouterr().out
    table = pq.read_table(pa.BufferReader(dataset.read(scan_key(0))))
    assert [captions[0]["text"] for captions in table["captions"].to_pylist()] == ["new 7", "new 2", "new 1"]


def test_a_damaged_piece_is_named_and_scanned_again(cut):
    config, dataset = cut
    for task in range(4):
        run_plan(config, dataset, Share(task, 5))
    key = "scan/pieces/00000000/000002.parquet"
    dataset.put(key, b"damaged")
    with pytest.raises(StoreError, match=f"{key}: damaged"):
        run_plan(config, dataset, ALONE)
    dataset.delete(key)
    assert run_plan(config, dataset, ALONE) is not None


def test_a_plan_that_was_begun_without_pieces_goes_on(cut, monkeypatch):
    config, dataset = cut
    monkeypatch.setattr(pieces, "PIECE_ROWS", 1000)
    config.sources.append(SourceConfig("parquet", config.sources[0].path))
    assert run_plan(config, dataset, Share(1, 2)) is None
    dataset.delete("scan/cuts.json")  # which earlier versions do not have
    before = dataset.read(scan_key(1))
    monkeypatch.setattr(pieces, "PIECE_ROWS", 2)
    assert run_plan(config, dataset, ALONE) is not None
    assert dataset.read(scan_key(1)) == before
    assert [len(ends) for ends in dataset_cuts(dataset)] == [5]
    assert dataset.exists(Manifest.KEY)


def dataset_cuts(dataset):
    return [file["ends"] for file in json.loads(dataset.read("scan/cuts.json"))["files"]]
