"""A shard holds its rows, is readable by mosaicml-streaming, and exists only when it is whole."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.base.format.mds.encodings import is_mds_encoding
from streaming.base.format.mds.reader import MDSReader
from streaming.base.format.mds.writer import MDSWriter

from data_prep.dataset import mds
from data_prep.dataset.mds import FIXED, VARIABLE, Shard, write_mds
from data_prep.dataset.schema import LATENT_COLUMNS, TEXT_COLUMNS
from model.common.errors import UserError

COLUMNS = {"text": "str", "id": "int", "data": "bytes"}
ROWS = st.lists(
    st.fixed_dictionaries(
        {"id": st.integers(-(2**63), 2**63 - 1), "data": st.binary(max_size=50), "text": st.text(max_size=20)}
    ),
    max_size=20,
)


def streaming_reader(path, columns, rows):
    names = sorted(columns)
    record = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "zip_data": None,
        "raw_data": {"basename": path.name, "bytes": path.stat().st_size, "hashes": {}},
        "samples": rows,
        "column_names": names,
        "column_encodings": [columns[name] for name in names],
        "column_sizes": [8 if columns[name] == "int" else None for name in names],
    }
    return MDSReader.from_json(str(path.parent), "", record)


@settings(deadline=None)
@given(rows=ROWS)
def test_rows_come_back_from_ours_and_from_streamings_reader(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("mds") / "shard.00000.mds"
    write_mds(path, COLUMNS, iter(rows))
    assert list(Shard(path, COLUMNS)) == rows
    reader = streaming_reader(path, COLUMNS, len(rows))
    assert [reader[i] for i in range(len(rows))] == rows


@settings(deadline=None, max_examples=30)
@given(rows=ROWS)
def test_the_file_is_the_one_that_streaming_writes(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("mds")
    write_mds(folder / "ours.mds", COLUMNS, rows)
    with MDSWriter(columns=COLUMNS, out=str(folder / "theirs"), size_limit=None) as writer:
        for row in rows:
            writer.write(row)
    if not rows:
        return  # MDSWriter writes no shard then
    assert list(Shard(folder / "theirs" / "shard.00000.mds", COLUMNS)) == rows
    assert (folder / "ours.mds").read_bytes() == (folder / "theirs" / "shard.00000.mds").read_bytes()


def test_our_encodings_are_streamings():
    assert all(
        is_mds_encoding(name)
        for name in [*FIXED, *VARIABLE, *LATENT_COLUMNS.values(), *TEXT_COLUMNS.values()]
    )


@pytest.mark.parametrize("columns", [LATENT_COLUMNS, TEXT_COLUMNS])
def test_the_columns_of_families_round_trip(tmp_path, columns):
    rows = [{name: 5 if encoding == "int" else b"\0\xff" * 7 for name, encoding in columns.items()}] * 3
    write_mds(tmp_path / "shard", columns, rows)
    assert list(Shard(tmp_path / "shard", columns)) == rows


def test_a_failing_encoder_leaves_no_shard(tmp_path):
    def rows():
        yield {"id": 1, "data": b"", "text": ""}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_mds(tmp_path / "shard", COLUMNS, rows())
    for wrong in (
        {"id": 1},
        {"id": 1, "data": "text", "text": ""},
        {"id": 1, "data": b"", "text": "", "more": b""},
    ):
        with pytest.raises((ValueError, TypeError)):
            write_mds(tmp_path / "shard", COLUMNS, [wrong])
    assert not list(tmp_path.iterdir())


def test_a_shard_over_four_gib_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mds, "MAX_OFFSET", 1000)
    with pytest.raises(UserError, match="part_rows"):
        write_mds(tmp_path / "shard", {"data": "bytes"}, [{"data": b"x" * 600}] * 2)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path, full_disk):
    with full_disk(100_000), pytest.raises(UserError, match=str(tmp_path / "shard")):
        write_mds(tmp_path / "shard", {"data": "bytes"}, [{"data": os.urandom(200_000)}])
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=60) | st.binary(max_size=20).map(lambda tail: b"\2\0\0\0" + b"\x20\0\0\0" * 3 + tail)
)
def test_anything_else_is_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("mds") / "shard"
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard"):
        list(Shard(path, COLUMNS))


def test_a_cut_shard_other_columns_and_pickle_are_refused(tmp_path):
    path = tmp_path / "shard"
    write_mds(path, COLUMNS, [{"id": 1, "data": b"12345", "text": "t"}] * 4)
    with pytest.raises(UserError, match="columns"):
        list(Shard(path, LATENT_COLUMNS))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"bytes"', b'"pkl"  '))
    with pytest.raises(UserError, match="pkl"):
        list(Shard(path, COLUMNS))
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="ends too early"):
        list(Shard(path, COLUMNS))
