"""Every file below a source's path belongs to rows, or is counted as ignored."""

import json
import os
import posixpath
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import BucketConfig, SourceConfig
from data_prep.pairs.pairs import run_pairs
from data_prep.plan.budget import print_budget
from data_prep.plan.listing import FILES_KEY, source_files
from data_prep.plan.plan import run_plan
from data_prep.report import write_report
from data_prep.sources import files as source_files_module
from data_prep.sources.files import BAD_NAME, BROKEN_LINK, HIDDEN, LINKED_FOLDER, OUTSIDE_LINK, SPECIAL
from data_prep.sources.folder import OTHER_SUFFIX, FolderSource
from data_prep.sources.mds import MDSSource
from data_prep.sources.parquet import ParquetSource
from data_prep.sources.sample import UNUSABLE, Inventory
from data_prep.sources.webdataset import WebDatasetSource
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.raw_material import (
    ALONE,
    all_pairs,
    config_of,
    png,
    prepare,
    sample_members,
    tar_bytes,
    write_mds_folder,
    write_parquet,
    write_tar,
)

PNG = png(1, 8, 8)


def write_tree(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if name.endswith((".png", ".jpe")) else b"text of " + path.name.encode())


def folder_of(path):
    return FolderSource(SourceConfig(kind="folder", path=str(path)))


def rows_of(source):
    rows = []
    for name in source.inventory().names:
        rows += list(source.read(name, ["caption"]))
    return rows


folders = st.sampled_from(["", "a/", "b/", "a/c/", "a/c/d/", "z/", ".hidden/", "a/tab\there/"])
names = st.sampled_from(
    [
        *("1.png", "2.jpe", "1.PNG", "1.txt", "1.TXT", "1.caption", "1.png.txt", "1.json", "2.heic", "2.txt"),
        *("README.md", ".DS_Store", "noise", "x.tar.gz", "tab\there.png", "tab\there.txt", "metadata.tsv"),
    ]
)
KINDS = {"webdataset": WebDatasetSource, "parquet": ParquetSource, "mds": MDSSource}
LISTED = {"webdataset": (".tar",), "parquet": (".parquet",), "mds": (".mds",)}
foreign_names = st.sampled_from(
    [
        *("0.tar", "1.TAR", "damaged.tar", "empty.tar", "0.tar.gz", "0.tar.zst", "tab\there.tar"),
        *("0.parquet", "1.PARQUET", "damaged.parquet", "empty.parquet", "tab\there.parquet", "a.arrow"),
        *("0.mds", "damaged.mds", "empty.mds", "0.mds.zstd", "index.json", "tab\there.mds"),
        *("1.png", "1.txt", "README.md", ".DS_Store", "noise", "metadata.tsv"),
    ]
)
foreign_trees = st.sets(st.builds(str.__add__, folders, foreign_names), min_size=1, max_size=14)
trees = st.sets(st.builds(str.__add__, folders, names), min_size=1, max_size=14)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees, st.sampled_from(["", "", "metadata.jsonl", "a/metadata.jsonl", "a/c/metadata.csv"]))
def test_every_file_of_a_folder_source_is_a_row_part_of_one_or_ignored(tmp_path_factory, tree, metadata):
    root = tmp_path_factory.mktemp("tree")
    write_tree(root, tree)
    if metadata:
        write_tree(root, [metadata])
        (root / metadata).write_text("")
    source = folder_of(root)
    visible = {name for name in tree if not any(part.startswith(".") for part in name.split("/"))}
    images = {name for name in visible if name.lower().endswith((".png", ".jpe"))}
    try:
        rows = rows_of(source)
    except UserError:
        # Only a tree without an image, or a file that has a text, has no units.
        rows = []
    if not rows:
        assert not images
        return

    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys), "no file is two rows"
    assert images <= set(keys), "every image is a row"

    inventory = source.inventory()
    assert inventory.found == len(tree) + bool(metadata)
    assert inventory.found == sum(inventory.units.values()) + sum(inventory.ignored.values())
    assert inventory.ignored[HIDDEN] == len(tree) - len(visible)
    for row in rows:
        if row.key in images:
            assert row.reason == (UNUSABLE if "\t" in row.key else row.reason)
        else:
            assert row.reason == OTHER_SUFFIX
    # A file without a row is the text of a row, or is ignored: never both, nor neither.
    texts = {name for name in visible if name.lower().endswith((".txt", ".caption", ".json"))}
    stems = {posixpath.splitext(name)[0] for name in texts}
    used = set()
    for key in keys:
        used.update([stem for stem in (posixpath.splitext(key)[0], key) if stem in stems][:1])
    alone = {
        name for name in visible - set(keys) if name not in texts or posixpath.splitext(name)[0] not in used
    }
    assert len(alone) == sum(inventory.ignored.values()) - inventory.ignored[HIDDEN]


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """A folder with a file of two rows of each kind: `0.tar`, `0.parquet`, and an MDS folder."""
    root = tmp_path_factory.mktemp("good")
    rows = [{"image": png(number, 8, 8), "caption": f"number {number}"} for number in range(2)]
    write_parquet(root / "0.parquet", rows)
    write_mds_folder(root / "mds", rows, {"image": "bytes", "caption": "str"})
    shutil.move(root / "mds/shard.00000.mds", root / "0.mds")
    (root / "0.tar").write_bytes(tar_bytes(samples(0, 1)))
    return root


def write_foreign_tree(root, names, good, lost):
    """Write files of all kinds; an index lists the shards of its folder, and `lost` that are not there."""
    write_tree(root, names)
    (entry,) = json.loads((good / "mds/index.json").read_text())["shards"]
    for name in names:
        stem, suffix = os.path.splitext(posixpath.basename(name))
        if suffix.lower() in (".tar", ".parquet", ".mds"):
            data = (good / f"0{suffix.lower()}").read_bytes()
            (root / name).write_bytes({"empty": b"", "damaged": data[: len(data) // 4]}.get(stem, data))
        elif name.endswith("index.json"):
            beside = [
                posixpath.basename(other)
                for other in names
                if other.endswith(".mds") and posixpath.dirname(other) == posixpath.dirname(name)
            ]
            shards = [
                {**entry, "raw_data": {**entry["raw_data"], "basename": shard}} for shard in [*beside, *lost]
            ]
            (root / name).write_text(json.dumps({"version": 2, "shards": shards}))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=foreign_trees, lost=st.sampled_from([[], [], ["lost.mds"]]))
def test_every_file_of_the_other_sources_is_rows_or_ignored(tmp_path_factory, good_files, kind, tree, lost):
    root = tmp_path_factory.mktemp("tree")
    write_foreign_tree(root, tree, good_files, lost)
    visible = {name for name in tree if not any(part.startswith(".") for part in name.split("/"))}
    usable = {name for name in visible if "\t" not in name}
    indexed = {posixpath.dirname(name) for name in usable if name.endswith("index.json")}
    meant = {
        name
        for name in usable
        if name.lower().endswith(LISTED[kind]) and (kind != "mds" or posixpath.dirname(name) in indexed)
    }
    absent = set()
    if kind == "mds":
        # What an index lists is a unit, also if it is not there or cannot be read by its name.
        absent = {posixpath.join(folder, name) for folder in indexed for name in lost}
        unusable = {name for name in visible - usable if name.endswith(".mds")}
        absent |= {name for name in unusable if posixpath.dirname(name) in indexed}
    source = KINDS[kind](SourceConfig(kind=kind, path=str(root)))
    try:
        inventory = source.inventory()
    except UserError:
        # Of MDS, a source without an index, or of indexes without shards, has no units.
        assert not meant
        assert not absent
        return

    assert set(inventory.names) == meant | absent
    assert {name: inventory.units[name] for name in inventory.names} == {
        name: int(name in meant) for name in inventory.names
    }
    assert inventory.found == len(tree)
    assert inventory.found == sum(inventory.units.values()) + sum(inventory.ignored.values())
    assert inventory.ignored[HIDDEN] == len(tree) - len(visible)
    inventory.check(str(root))
    for name in inventory.names:
        rows = list(source.read(name, ["caption"]))
        good = [row.record["caption"] for row in rows if not row.reason]
        whole = name not in absent and not posixpath.basename(name).startswith(("damaged", "empty"))
        assert rows, "a file without rows would be lost without a word"
        assert (good == ["number 0", "number 1"]) == whole


@pytest.mark.parametrize(
    "names",
    [
        ["cover", "train/1", "train/2", "val/3"],
        ["a/1", "a/2", "a/more/3", "a/more/4"],
        ["a/z1", "a/z2", "a/more/3", "a/more/4"],
        ["a/b/1", "a/c/2", "d/3"],
        ["zz_sample", "10_girl/1", "reg/1_girl/2"],
    ],
)
def test_images_below_a_folder_with_images_are_rows(tmp_path, names):
    for name in names:
        write_tree(tmp_path, [f"{name}.png"])
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(row.record["caption"] for row in rows_of(folder_of(tmp_path))) == sorted(names)


def test_files_that_have_a_text_are_dropped_by_name_and_others_ignored_by_suffix(tmp_path):
    write_tree(
        tmp_path, ["1.png", "1.txt", "2.heic", "2.txt", "3.tif", "3.json", "4.heic", "README.md", "lost.txt"]
    )
    source = folder_of(tmp_path)
    rows = {row.key: row.reason for row in rows_of(source)}
    assert rows == {"1.png": "", "2.heic": OTHER_SUFFIX, "3.tif": OTHER_SUFFIX}
    assert source.inventory().ignored == {".heic": 1, ".md": 1, ".txt": 1}


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "pjpeg", "pjp", "JPG", "JPEG", "PNG"])
def test_all_names_of_the_formats_are_images(tmp_path, suffix):
    (tmp_path / f"1.{suffix}").write_bytes(PNG)
    assert [row.reason for row in rows_of(folder_of(tmp_path))] == [""]
    write_tar(tmp_path / "t", "a.tar", [(f"1.{suffix}", PNG)])
    assert [row.reason for row in rows_of(WebDatasetSource(SourceConfig(path=str(tmp_path / "t"))))] == [""]


def test_a_folder_of_unknown_formats_is_an_error_that_names_them(tmp_path):
    write_tree(tmp_path, ["1.heic", "2.heic", "x.tif"])
    with pytest.raises(UserError, match=r"there are: 2 \.heic, 1 \.tif"):
        folder_of(tmp_path).inventory()


def test_links_and_special_files_are_ignored_by_kind(tmp_path):
    source, outside = tmp_path / "in", tmp_path / "outside"
    write_tree(source, ["1.png", "1.txt", "sub/2.png", "a\tb/3.png"])
    write_tree(outside, ["secret.txt", "secret.png", "more/4.png"])
    (source / "inside.png").symlink_to(source / "1.png")
    (source / "leak.png").symlink_to(outside / "secret.png")
    (source / "sub/2.txt").symlink_to(outside / "secret.txt")
    (source / "linked").symlink_to(outside / "more")
    (source / "self").symlink_to(source)
    (source / "circle.png").symlink_to(source / "circle.png")
    (source / "broken.png").symlink_to(source / "nothing.png")
    (source / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(source / "pipe.png")
    os.mkfifo(source / "pipe.tar")
    folder = folder_of(source)
    rows = {row.key: row for row in rows_of(folder)}
    assert {key for key, row in rows.items() if not row.reason} == {"1.png", "inside.png", "sub/2.png"}
    assert rows["a\tb/3.png"].reason == UNUSABLE
    assert rows["sub/2.png"].record == {}
    assert folder.inventory().ignored == {
        OUTSIDE_LINK: 2,
        LINKED_FOLDER: 2,
        BROKEN_LINK: 2,
        SPECIAL: 3,
    }
    write_tar(source, "a.tar", sample_members("1", PNG, {"caption": "x"}))
    tars = WebDatasetSource(SourceConfig(path=str(source)))
    assert tars.inventory().names == ["a.tar"]


def test_names_of_any_bytes_cost_one_file_each(tmp_path):
    for name in (
        b"caf\xe9.png",
        b"caf\xe9.txt",
        b"line\nbreak.png",
        b"back\\slash.png",
        b"good.png",
        b"caf\xe9.tar",
    ):
        (tmp_path / os.fsdecode(name)).write_bytes(PNG)
    rows = rows_of(folder_of(tmp_path))
    assert sorted(row.reason for row in rows) == ["", UNUSABLE, UNUSABLE, UNUSABLE]
    (tmp_path / "good.tar").write_bytes(tar_bytes(sample_members("1", PNG, {"caption": "x"})))
    tars = WebDatasetSource(SourceConfig(path=str(tmp_path))).inventory()
    assert tars.names == ["good.tar"]
    assert tars.ignored[BAD_NAME] == 1


def test_other_sources_count_what_they_ignore(tmp_path):
    write_tar(tmp_path / "t", "a.tar", sample_members("1", PNG, {"caption": "x"}))
    write_tree(tmp_path / "t", ["b.tar.gz", "c.tar.zst", "notes.txt", "noise"])
    assert WebDatasetSource(SourceConfig(path=str(tmp_path / "t"))).inventory() == Inventory(
        5, {"a.tar": 1}, {".tar.gz": 1, ".tar.zst": 1, ".txt": 1, "no suffix": 1}
    )
    write_parquet(tmp_path / "p/a.parquet", [{"image": "i/1.png", "caption": "x"}])
    write_tree(tmp_path / "p", ["i/1.png", "a.arrow"])
    parquet = ParquetSource(SourceConfig(kind="parquet", path=str(tmp_path / "p"))).inventory()
    assert parquet.ignored == {".png, read where a row names it": 1, ".arrow": 1}
    write_mds_folder(tmp_path / "m", [{"image": PNG, "caption": "x"}], {"image": "bytes", "caption": "str"})
    write_tree(tmp_path / "m", ["shard.00009.mds.zstd"])
    mds = MDSSource(SourceConfig(kind="mds", path=str(tmp_path / "m"))).inventory()
    assert (mds.found, sum(mds.units.values()), mds.ignored) == (3, 1, {"index.json": 1, ".zstd": 1})


def test_any_number_of_suffixes_is_counted_in_few_kinds():
    inventory = Inventory(found=1000)
    inventory.ignore(f"1.suffix{n}" for n in range(1000))
    assert len(inventory.ignored) <= 51
    inventory.check("path")
    inventory.found += 1
    with pytest.raises(RuntimeError, match="1001 files, but 1000"):
        inventory.check("path")


@pytest.mark.parametrize(("kind", "suffix"), [("parquet", "arrow"), ("webdataset", "tif"), ("folder", "csv")])
def test_a_path_to_a_file_of_another_suffix_is_named(tmp_path, kind, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    kinds = {"parquet": ParquetSource, "webdataset": WebDatasetSource, "folder": FolderSource}
    with pytest.raises(UserError, match=rf"a\.{suffix}: (not a|a file)"):
        kinds[kind](SourceConfig(kind=kind, path=str(tmp_path / f"a.{suffix}")))


@pytest.mark.parametrize("folders", [10, 80])
def test_a_task_lists_a_folder_source_once(tmp_path, folders, monkeypatch):
    write_tree(tmp_path, [f"{n}/{n}.png" for n in range(folders)] + [f"{n}/{n}.txt" for n in range(folders)])
    scanned = []
    real = os.scandir
    monkeypatch.setattr(source_files_module.os, "scandir", lambda path: (scanned.append(path), real(path))[1])
    assert len(rows_of(folder_of(tmp_path))) == folders
    assert len(scanned) == folders + 1


@pytest.mark.parametrize("count", [10, 200])
def test_metadata_in_many_folders_is_assigned_in_linear_time(tmp_path, count, monkeypatch):
    write_tree(tmp_path, [f"{n}/metadata.csv" for n in range(count)] + [f"{n}/1.png" for n in range(count)])
    calls = []
    real = FolderSource._unit_name
    monkeypatch.setattr(FolderSource, "_unit_name", lambda *args: (calls.append(args), real(*args))[1])
    assert len(folder_of(tmp_path).inventory().names) == count
    assert len(calls) == 2 * count


def test_the_plan_and_the_report_show_what_was_ignored(tmp_path, capsys):
    write_tree(tmp_path / "in", ["1.png", "1.txt", "sub/2.png", "sub/2.txt", "3.heic", "4.heic"])
    (tmp_path / "in/sub/2.png").write_bytes(png(2))
    (tmp_path / "in/1.png").write_bytes(png(3))
    config = config_of(tmp_path, ("folder", tmp_path / "in"))
    dataset = prepare(config)
    print_budget(config, dataset, run_plan(config, dataset, ALONE), 400)
    printed = capsys.readouterr().out
    assert "(6 files): 2 .heic" in printed
    assert "for example: text of" in printed
    write_report(config, dataset, tmp_path / "report.html")
    assert "2 .heic" in (tmp_path / "report.html").read_text()


def test_the_plan_names_metadata_files_that_are_not_read(tmp_path, capsys):
    write_tree(tmp_path / "in", ["1.png", "1.txt", "a/2.png", "a/2.txt", "a/notes.tsv"])
    (tmp_path / "in/a/2.png").write_bytes(png(2))
    ignored = ["Metadata.CSV", "metadata.json", "metadata.tsv", "metadata.xlsx", "a/metadata.tsv"]
    write_tree(tmp_path / "in", [*ignored, "a/metadata.jsonl.gz"])
    config = config_of(tmp_path, ("folder", tmp_path / "in"))
    dataset = prepare(config)
    print_budget(config, dataset, run_plan(config, dataset, ALONE), 400)
    listed = "2 metadata.tsv, 1 .tsv, 1 Metadata.CSV, 1 metadata.json, 1 metadata.jsonl.gz, 1 metadata.xlsx"
    assert f"(11 files): {listed}\n" in capsys.readouterr().out


def test_captions_that_are_lists_as_text_are_warned_of(tmp_path, capsys):
    members = []
    for n in range(3):
        members += sample_members(str(n), png(n), {"caption": f'["number {n}"]' if n else "plain"})
    write_tar(tmp_path / "in", "a.tar", members)
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = prepare(config)
    print_budget(config, dataset, run_plan(config, dataset, ALONE), 400)
    assert "warning: 2 of 3 captions begin with a bracket" in capsys.readouterr().out


def test_a_plan_that_is_run_again_names_source_files_that_came_later(tmp_path, capsys):
    write_tar(tmp_path / "in", "0.tar", sample_members("a", png(1), {"caption": "x"}))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_plan(config, dataset, ALONE)
    assert "came after" not in capsys.readouterr().out
    write_tar(tmp_path / "in", "1.tar", sample_members("b", png(2), {"caption": "y"}))
    assert run_plan(config, dataset, ALONE) is not None
    assert "1 source files, such as 0:1.tar, came after the plan" in capsys.readouterr().out
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    assert run_plan(config, dataset, ALONE) is not None
    assert "cannot look for new source files" in capsys.readouterr().out


def samples(*numbers):
    members = []
    for number in numbers:
        members += sample_members(str(number), png(number), {"caption": f"number {number}"})
    return members


def test_a_tar_that_grew_since_the_plan_is_named_where_its_rows_are_read(store_uri, tmp_path, capsys):
    source = open_store(store_uri, create=True).sub("raw")
    for name, numbers in (("a.tar", (1, 2)), ("b.tar", (3, 4))):
        source.put(name, tar_bytes(samples(*numbers)))
    config = config_of(tmp_path, ("webdataset", source.uri))
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    run_plan(config, dataset, ALONE)
    assert "changed" not in capsys.readouterr().out

    source.put("b.tar", tar_bytes(samples(3, 4, 5)))
    run_pairs(config, dataset, ALONE)
    line = "1 source files, such as 0:b.tar, have changed since they were listed, and what came since may be "
    assert f"pairs: {line}missing: to include it, plan under another `name`" in capsys.readouterr().out
    assert len(all_pairs(dataset)) == 4
    run_plan(config, dataset, ALONE)
    assert f"plan: {line}" in capsys.readouterr().out


def test_a_tar_that_is_written_while_the_plan_reads_it_is_named(tmp_path, capsys, monkeypatch):
    write_tar(tmp_path / "in", "a.tar", samples(1, 2))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    read = WebDatasetSource.read

    def read_while_it_grows(self, name, columns):
        yield from read(self, name, columns)
        write_tar(tmp_path / "in", "a.tar", samples(1, 2, 3))

    monkeypatch.setattr(WebDatasetSource, "read", read_while_it_grows)
    run_plan(config, dataset, ALONE)
    assert "plan: 1 source files, such as 0:a.tar, have changed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["parquet", "mds", "folder"])
def test_a_plan_that_is_run_again_names_files_of_every_kind_that_changed(tmp_path, kind, capsys):
    write_parquet(tmp_path / "parquet/a.parquet", [{"image": PNG, "caption": "x"}])
    encodings = {"image": "bytes", "caption": "str"}
    write_mds_folder(tmp_path / "mds", [{"image": PNG, "caption": "x"}], encodings)
    write_tree(tmp_path / "folder", ["1.png", "1.txt"])
    config = config_of(tmp_path, (kind, tmp_path / kind), buckets=BucketConfig(resolution=8, max_aspect=1.0))
    config.buckets.step = 8
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    if kind == "folder":
        write_tree(tmp_path / "folder", ["2.png", "2.txt"])
    else:
        path = next(path for path in (tmp_path / kind).iterdir() if path.suffix in (".parquet", ".mds"))
        path.write_bytes(path.read_bytes() + b"more")
    run_plan(config, dataset, ALONE)
    assert "1 source files, such as 0:" in (printed := capsys.readouterr().out)
    assert "have changed since they were listed" in printed


def test_a_list_of_an_earlier_version_knows_no_changes(tmp_path, capsys):
    write_tar(tmp_path / "in", "a.tar", samples(1, 2))
    config = config_of(tmp_path, ("webdataset", tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    dataset.put(FILES_KEY, b'[[0,0,"a.tar"]]')
    run_plan(config, dataset, ALONE)
    write_tar(tmp_path / "in", "a.tar", samples(1, 2, 3))
    run_pairs(config, dataset, ALONE)
    run_plan(config, dataset, ALONE)
    assert len(all_pairs(dataset)) == 2
    assert "changed" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder"])
def test_a_listed_file_that_vanished_is_an_error_with_a_way_out(tmp_path, kind):
    write_tar(tmp_path / "in", "0.tar", sample_members("a", png(1), {"caption": "x"}))
    write_parquet(tmp_path / "in/0.parquet", [{"image": png(1), "caption": "x"}])
    write_tree(tmp_path / "in", ["sub/1.png", "sub/1.txt", "2.png", "2.txt"])
    (tmp_path / "in/2.png").write_bytes(png(2))
    config = config_of(tmp_path, (kind, tmp_path / "in"))
    dataset = open_store(config.store, create=True).sub("ds")
    run_plan(config, dataset, ALONE)
    for key in list(dataset.list("")):
        if not key.startswith(("dataset", "scan/files", "scan/sources")):
            dataset.delete(key)
    for name in ("0.tar", "0.parquet", "sub/1.png", "sub/1.txt"):
        (tmp_path / "in" / name).unlink()
    assert source_files(dataset)
    with pytest.raises(UserError, match=r"was listed, and does not exist any more: put it back, or delete"):
        run_plan(config, dataset, ALONE)
    if kind == "folder":
        for key in list(dataset.list("scan/")):
            dataset.delete(key)
        assert run_plan(config, dataset, ALONE) is not None
