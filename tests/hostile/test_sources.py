"""Hostile sources: a bad item costs one row or one counted file, and nothing hangs or is read unbounded."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DedupeConfig, SourceConfig
from data_prep.dataset.parts import read_plan_record
from data_prep.plan.captions import NOT_TEXT
from data_prep.plan.listing import FILES_KEY
from data_prep.plan.plan import run_plan
from data_prep.sources.files import BAD_NAME, DEEP_FOLDER, LOCKED_FOLDER, SourceFiles
from data_prep.sources.folder import BAD_LINE, FolderSource
from data_prep.sources.mds import MDSSource
from data_prep.sources.sample import (
    NO_ACCESS,
    NO_IMAGE,
    NOT_REGULAR,
    OUTSIDE,
    TOO_LARGE,
    UNREADABLE,
    UNUSABLE,
    RefusedError,
)
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.raw_material import (
    ALONE,
    all_pairs,
    config_of,
    png,
    prepare,
    reasons_of,
    rows_of,
    sample_members,
    write_mds_folder,
    write_parquet,
    write_tar,
)

PNG = png(1)
GOOD = sample_members("good", PNG, {"caption": "a good one"})


def test_a_file_that_changes_after_the_listing_is_looked_at_again(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(PNG)
    (tmp_path / "in/linked").mkdir(parents=True)
    (tmp_path / "in/more").symlink_to(tmp_path)
    files = SourceFiles(str(tmp_path / "in"))
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/leak.png").symlink_to(outside)
    (tmp_path / "in/self.png").symlink_to("self.png")
    (tmp_path / "in/large.png").touch()
    os.truncate(tmp_path / "in/large.png", 10 << 30)
    for name, reason in (
        ("pipe.png", NOT_REGULAR),
        ("leak.png", OUTSIDE),
        ("more/secret.png", OUTSIDE),
        ("self.png", NOT_REGULAR),
        ("large.png", TOO_LARGE),
        ("../secret.png", UNUSABLE),
        ("a\nb.png", UNUSABLE),
    ):
        with pytest.raises(RefusedError) as error:
            files.read(name)
        assert error.value.reason == reason
        if name != "large.png":
            with pytest.raises(RefusedError):
                files.read_range(name, 0, 10)
    with pytest.raises(IsADirectoryError):
        files.read("linked")


def test_large_files_are_never_read(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("0.png", 10 << 30), ("1.txt", 10 << 30), ("metadata.csv", 10 << 30)):
        (tmp_path / "in" / name).touch()
        os.truncate(tmp_path / "in" / name, size)
    (tmp_path / "in/1.png").write_bytes(PNG)
    rows = rows_of("folder", tmp_path / "in")
    assert {row.key: row.reason for row in rows} == dict.fromkeys(
        ("metadata.csv", "0.png", "1.png"), TOO_LARGE
    )


@contextlib.contextmanager
def without_privileges():
    """Yield a folder, and a function that takes the right to read one of its entries."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    is_root = os.geteuid() == 0
    try:
        yield folder, lambda name: (folder / name).chmod(0)
    finally:
        if is_root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_unreadable_folders_and_files_are_counted():
    with without_privileges() as (folder, lock):
        for name in ("1.png", "2.png", "2.txt", "3.png", "sub/4.png", "sub/5.png", "ok/6.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(PNG)
        write_tar(folder, "a.tar", GOOD)
        write_parquet(folder / "a.parquet", [{"image": PNG, "caption": "x"}])
        for name in ("1.png", "2.txt", "a.tar", "a.parquet", "sub"):
            lock(name)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may read everything
        source = FolderSource(SourceConfig(kind="folder", path=str(folder)))
        rows = {}
        for name in source.inventory().names:
            rows |= {row.key: row.reason for row in source.read(name, [])}
        assert rows == {"1.png": NO_ACCESS, "2.png": NO_ACCESS, "3.png": "", "ok/6.png": ""}
        assert source.inventory().ignored == {".tar": 1, ".parquet": 1, LOCKED_FOLDER: 1}
        for kind in ("webdataset", "parquet"):
            assert [row.reason for row in rows_of(kind, folder)] == [NO_ACCESS]


def test_a_folder_too_deep_to_be_opened_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(PNG)
    for _ in range(30):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    Path("2.png").write_bytes(PNG)
    os.chdir(tmp_path)
    assert [row.key for row in rows_of("folder", tmp_path)] == ["1.png"]
    source = FolderSource(SourceConfig(kind="folder", path=str(tmp_path)))
    assert source.inventory().ignored == {DEEP_FOLDER: 1}


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "a\nb.tar", "a//b.tar", ""])
def test_a_name_from_outside_in_the_frozen_list_costs_a_row(tmp_path, name):
    write_tar(tmp_path / "in", "0.tar", GOOD)
    write_tar(tmp_path, "secret.tar", sample_members("secret", png(2), {"caption": "secret"}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    dataset.put_new(FILES_KEY, json.dumps([[0, 0, "0.tar"], [1, 0, name]]).encode())
    run_plan(config, dataset, ALONE)
    assert [file["dropped"] for file in read_plan_record(dataset)["files"]] == [{}, {UNUSABLE: 1}]


@pytest.fixture(scope="module")
def mds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mds") / "m"
    rows = [{"image": PNG, "caption": f"number {n}"} for n in range(4)]
    write_mds_folder(folder, rows, {"image": "bytes", "caption": "str"})
    return folder


def mds_copy(mds, tmp_path, change):
    shutil.copytree(mds, tmp_path / "m")
    index = json.loads((tmp_path / "m/index.json").read_text())
    change(index["shards"][-1])
    (tmp_path / "m/index.json").write_text(json.dumps(index))
    return tmp_path / "m"


def test_a_shard_that_left_its_index_is_missing(mds):
    with pytest.raises(FileNotFoundError):
        list(MDSSource(SourceConfig(kind="mds", path=str(mds))).read("shard.00099.mds", []))


@pytest.mark.parametrize("samples", [10**12, 3, 5, 0, -1])
def test_an_mds_index_cannot_lie_about_rows(mds, tmp_path, samples):
    folder = mds_copy(mds, tmp_path, lambda shard: shard.update(samples=samples))
    rows = rows_of("mds", folder, limit=5000)
    assert [row.reason for row in rows if row.reason][:1] == [UNREADABLE]


@pytest.mark.parametrize(
    "change",
    [
        {"column_sizes": ["8", None]},
        {"column_sizes": [-8, None]},
        {"column_sizes": [None]},
        {"column_names": "image"},
        {"column_names": [["image"], "caption"]},
        {"samples": "many"},
        {"samples": None},
        {"raw_data": None},
        {"raw_data": {"basename": 5}},
        {"format": None},
    ],
)
def test_an_mds_index_of_other_types_is_one_line(mds, tmp_path, change):
    folder = mds_copy(mds, tmp_path, lambda shard: shard.update(change))
    with pytest.raises(UserError):
        rows_of("mds", folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"compression": "zstd:3", "zip_data": {"basename": "shard.00000.mds.zstd"}},
            r"index\.json: shard 'shard\.00000\.mds\.zstd' is compressed with zstd:3: write the",
        ),
        (
            {"format": "json"},
            r"index\.json: shard 'shard\.\d+\.mds' is 'json', not MDS: write the dataset again",
        ),
        ({"compression": "zstd", "zip_data": None}, "not an MDS index"),
    ],
)
def test_shards_that_are_not_read_are_named(mds, tmp_path, change, line):
    folder = mds_copy(mds, tmp_path, lambda shard: shard.update(change))
    with pytest.raises(UserError, match=line):
        rows_of("mds", folder)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"shards":' * 50_000, "", "null", "[]", '{"shards": 5}', "\0"]
)
def test_an_mds_index_of_any_text_is_one_line(mds, tmp_path, text):
    shutil.copytree(mds, tmp_path / "m")
    (tmp_path / "m/index.json").write_text(text)
    with pytest.raises(UserError, match="not an MDS index"):
        rows_of("mds", tmp_path / "m")


def test_names_that_no_store_accepts_cost_one_mds_shard_each(mds, tmp_path):
    shutil.copytree(mds, tmp_path / "in/good")
    shutil.copytree(mds, tmp_path / "in/tab\there")
    shutil.copytree(mds, tmp_path / "in/bad")
    count = len(list(mds.glob("*.mds")))
    shard = next((tmp_path / "in/bad").glob("*.mds"))
    shard.rename(shard.with_name("a\tb.mds"))
    index = tmp_path / "in/bad/index.json"
    index.write_text(index.read_text().replace(shard.name, "a\\tb.mds"))
    dataset = prepare(config_of(tmp_path, ("mds", tmp_path / "in"), dedupe=DedupeConfig(exact=False)))
    assert 4 < len(all_pairs(dataset)) < 8
    assert reasons_of(dataset) == {UNUSABLE: 1}
    (counts,) = read_plan_record(dataset)["sources"]
    assert counts == {"files": 3 * count + 3, "ignored": {"index.json": 2, BAD_NAME: count + 2}}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mds_shards_of_any_bytes_give_as_many_rows_as_promised(mds, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    shutil.copytree(mds, folder, dirs_exist_ok=True)
    shard = next(folder.glob("*.mds"))
    content = bytearray(shard.read_bytes())
    for place in data.draw(st.lists(st.integers(0, min(200, len(content) - 1)), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    shard.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert len(rows_of("mds", folder)) >= 1


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1 << 50] * 2, pa.timestamp("ms")),
        pa.array([0, 1], pa.timestamp("s", "Mars/Olympus")),
        pa.array([1 << 60] * 2, pa.duration("ms")),
        pa.array([1, 2], pa.decimal128(20, 2)),
        pa.array([[b"x"], None], pa.list_(pa.binary())),
    ],
    ids=["year", "zone", "duration", "decimal", "bytes"],
)
def test_values_that_are_no_text_cost_their_row(tmp_path, column):
    (tmp_path / "in").mkdir()
    table = pa.table({"image": [PNG, png(2)], "caption": column})
    pq.write_table(table, tmp_path / "in/a.parquet")
    write_parquet(tmp_path / "in/b.parquet", [{"image": png(3), "caption": "good"}])
    dataset = prepare(config_of(tmp_path, ("parquet", tmp_path / "in")))
    assert [pair.captions for pair in all_pairs(dataset)] == [[("original", "good")]]
    assert sum(reasons_of(dataset).values()) == 2
    assert NOT_TEXT in reasons_of(dataset)


def test_paths_that_are_no_paths_are_explained(tmp_path):
    images = ["https://a.org/1.png", "data:image/png;base64,AAAA", "iVBORw0KGgo" * 40]
    paths = ["../1.png", "/home/me/1.png", "train/1.png"]
    images = [*images, *paths, *({"bytes": None, "path": path} for path in paths)]
    for number, image in enumerate(images):
        write_parquet(tmp_path / f"{number}.parquet", [{"image": image, "caption": "x"}])
    rows = rows_of("parquet", tmp_path)
    assert {row.reason for row in rows} == {OUTSIDE, NO_IMAGE}
    details = [row.detail.partition(":")[0] for row in rows]
    assert details == ["a URL", "base64", "base64", *["a path"] * 6]
    assert all("embed the images" in row.detail and row.detail.endswith(".png") for row in rows[3:])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_parquet_of_any_bytes_costs_rows_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder / "a.parquet", [{"image": PNG[:50], "caption": f"{n}"} for n in range(6)])
    content = bytearray((folder / "a.parquet").read_bytes())
    start = data.draw(st.sampled_from([0, max(0, len(content) - 700)]))
    for place in data.draw(st.lists(st.integers(start, min(start + 699, len(content) - 9)), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (folder / "a.parquet").write_bytes(content)
    assert len(rows_of("parquet", folder, limit=1 << 21)) >= 1


metadata_names = st.sampled_from(["metadata.jsonl", "metadata.csv", "metadata.parquet"])
LINES = (
    *(b"file_name,caption\n", b"1.png,one\n", b"1.png\n", b"../x.png,a\n", b'"', b"\n", b"\0", b"PAR1"),
    *(b'{"file_name": "1.png"}\n', b'{"file_name": ["1.png"]}\n', b"{\n", b"[" * 3000 + b"\n"),
    *(b"\xff\xfe", b"\xef\xbb\xbf"),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata_names, st.lists(st.sampled_from(LINES), max_size=8).map(b"".join))
def test_metadata_of_any_bytes_costs_rows_and_the_images_stay(tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "1.png").write_bytes(PNG)
    (folder / name).write_bytes(content)
    rows = rows_of("folder", folder)
    assert "1.png" in {row.place.path for row in rows}
    assert len(rows) <= 12


def test_one_long_field_of_a_csv_costs_its_own_row(tmp_path):
    (tmp_path / "in").mkdir()
    lines = ["file_name,caption"]
    for n in range(3):
        (tmp_path / f"in/{n}.png").write_bytes(png(n))
        lines.append(f"{n}.png,{'x' * (200_000 if n == 1 else 5)}")
    (tmp_path / "in/metadata.csv").write_text("\n".join(lines))
    dataset = prepare(config_of(tmp_path, ("folder", tmp_path / "in")))
    assert sorted(pair.key for pair in all_pairs(dataset)) == ["0.png", "2.png"]
    assert reasons_of(dataset) == {"caption: over 65536 bytes": 1}


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("metadata.parquet", None, ["number 0"]),
        ("metadata.jsonl", b'{"image_file_name": "0.png", "caption": "number 0"}', ["number 0"]),
        ("metadata.jsonl", b'{"image": "0.png", "caption": "number 0"}', ["number 0"]),
        ("metadata.csv", b"file_name,caption\r\n.\\0.png,number 0\r\n", ["number 0"]),
        ("metadata.csv", "\ufefffile_name,caption\n0.png,number 0\n".encode(), ["number 0"]),
        ("0.caption", b"number 0", ["number 0"]),
        ("0.TXT", b"number 0", ["number 0"]),
        ("0.png.txt", b"\xef\xbb\xbfnumber 0\r\n", ["number 0"]),
        ("0.json", b'{"caption": "number 0"}', ["number 0"]),
    ],
)
def test_captions_of_every_usual_layout_are_read(tmp_path, name, content, captions):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(PNG)
    if content is None:
        write_parquet(tmp_path / "in" / name, [{"file_name": "0.png", "caption": "number 0"}])
    else:
        (tmp_path / "in" / name).write_bytes(content)
    pairs = all_pairs(prepare(config_of(tmp_path, ("folder", tmp_path / "in"))))
    assert [text for pair in pairs for _, text in pair.captions] == captions


@pytest.mark.parametrize(
    ("name", "content", "reason", "detail"),
    [
        ("metadata.csv", b"file_name;caption\n0.png;x\n", NO_IMAGE, "among the columns file_name;caption"),
        ("metadata.jsonl", b'{"path": "0.png", "text": "x"}', NO_IMAGE, "among the columns path, text"),
        (
            "metadata.jsonl",
            b'{"a_file_name": "0.png", "b_file_name": "0.png"}',
            NO_IMAGE,
            "a_file_name, b_file",
        ),
        ("metadata.csv", "file_name,caption\n0.png,x\n".encode("utf-16"), UNREADABLE, "save it as UTF-8"),
        ("metadata.parquet", b"PAR1", UNREADABLE, ""),
        ("metadata.jsonl", b"[1]", BAD_LINE, ""),
        ("0.json", b"[1]", "source: damaged JSON", "not an object"),
    ],
)
def test_layouts_that_are_not_read_are_named(tmp_path, name, content, reason, detail):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / name).write_bytes(content)
    first = rows_of("folder", tmp_path)[0]
    assert first.reason == reason
    assert detail in first.detail
