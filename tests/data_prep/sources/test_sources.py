import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import FilterConfig, SourceConfig
from data_prep.sources.files import BAD_NAME, HIDDEN, SourceFiles
from data_prep.sources.folder import BAD_LINE, FolderSource
from data_prep.sources.mds import MDSSource
from data_prep.sources.openmoji import OpenMojiSource
from data_prep.sources.parquet import NO_COLUMN, ParquetSource
from data_prep.sources.sample import NO_IMAGE, OUTSIDE, TOO_LARGE, UNREADABLE, RefusedError
from data_prep.sources.webdataset import WebDatasetSource
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.raw_material import (
    all_pairs,
    config_of,
    png,
    prepare,
    reasons_of,
    sample_members,
    tar_bytes,
    write_mds_folder,
    write_parquet,
    write_tar,
)

IMAGES = [png(number) for number in range(7)]


def rows_of(source, columns=("caption", "extra")):
    rows = []
    for name in source.inventory().names:
        rows += [(name, sample) for sample in source.read(name, columns)]
    return rows


def check_fetch(source):
    """Check that `fetch` gives the bytes that `read` gave, in any order of the places."""
    for name in source.inventory().names:
        good = [sample for sample in source.read(name, ["caption"]) if not sample.reason][::-1]
        fetched = dict(source.fetch(name, [sample.place for sample in good]))
        assert [fetched[position] for position in range(len(good))] == [sample.image for sample in good]


def tar_of(numbers, **record):
    members = []
    for n in numbers:
        members += sample_members(f"{n:04d}", IMAGES[n], {"caption": f"image {n}", **record})
    return tar_bytes(members)


@pytest.mark.parametrize("glob", ["", "/*.tar", "/b.tar"])
def test_webdataset(store_uri, glob):
    store = open_store(store_uri, create=True)
    store.put("b.tar", tar_of([2, 3], extra=["x", "y"]))
    store.put("a.tar", tar_of([0, 1]))
    store.put("notes.txt", b"not a tar")
    source = WebDatasetSource(SourceConfig(path=store_uri + glob))
    expected = [("a.tar", 0), ("a.tar", 1), ("b.tar", 2), ("b.tar", 3)]
    expected = [entry for entry in expected if glob != "/b.tar" or entry[0] == "b.tar"]
    rows = rows_of(source)
    assert [(name, sample.record["caption"]) for name, sample in rows] == [
        (name, f"image {n}") for name, n in expected
    ]
    assert [sample.image for _, sample in rows] == [IMAGES[n] for _, n in expected]
    check_fetch(source)


def test_img2dataset_layout(tmp_path):
    record = {"caption": "from json", "url": "u", "width": 3}
    write_tar(
        tmp_path,
        "0.tar",
        [("0.png", IMAGES[0]), ("0.txt", b"from txt"), ("0.json", json.dumps(record).encode())],
    )
    write_tar(tmp_path, "1.tar", [("a/b.x.png", IMAGES[1]), ("a/b.txt", b"only txt")])
    first, *rest = [sample for _, sample in rows_of(WebDatasetSource(SourceConfig(path=str(tmp_path))))]
    assert (first.record["caption"], first.record["txt"]) == ("from json", "from txt")
    assert [sample.record.get("caption") for sample in rest] == ["only txt"]


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_bytes(store_uri, as_struct, tmp_path):
    rows = [
        {
            "image": {"bytes": image, "path": None} if as_struct else image,
            "caption": [f"one {n}", f"two {n}"],
            "extra": n,
            "unused": "x",
        }
        for n, image in enumerate(IMAGES)
    ]
    write_parquet(tmp_path / "local.parquet", rows)
    open_store(store_uri, create=True).put("in/a.parquet", (tmp_path / "local.parquet").read_bytes())
    source = ParquetSource(SourceConfig(kind="parquet", path=f"{store_uri}/in/*.parquet"))
    samples = [sample for _, sample in rows_of(source)]
    assert [sample.image for sample in samples] == IMAGES
    assert samples[3].record == {"caption": ["one 3", "two 3"], "extra": 3}
    check_fetch(source)


def test_parquet_with_paths(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(IMAGES[0])
    (tmp_path.parent / "outside.png").write_bytes(IMAGES[1])
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "outside.png")
    paths = [
        "images/0.png",
        f"{tmp_path}/images/0.png",
        "absent.png",
        "../outside.png",
        str(tmp_path.parent / "outside.png"),
        "link.png",
        "images",
        "a\0b",
    ]
    write_parquet(tmp_path / "a.parquet", [{"image": path, "caption": "x"} for path in paths])
    source = ParquetSource(SourceConfig(kind="parquet", path=str(tmp_path)))
    samples = [sample for _, sample in rows_of(source)]
    assert [sample.image for sample in samples] == [IMAGES[0], IMAGES[0], None, None, None, None, None, None]
    assert [sample.reason for sample in samples] == [
        "",
        "",
        NO_IMAGE,
        OUTSIDE,
        OUTSIDE,
        OUTSIDE,
        NO_IMAGE,
        OUTSIDE,
    ]
    check_fetch(source)


def test_parquet_with_paths_in_a_bucket(s3, tmp_path):
    store = open_store(s3)
    store.put("in/images/0.png", IMAGES[0])
    inside = ["images/0.png", f"{s3}/in/images/0.png", "absent.png"]
    paths = [*inside, "../in/images/0.png", "s3://other/0.png", "/etc/passwd"]
    write_parquet(tmp_path / "a.parquet", [{"image": path, "caption": "x"} for path in paths])
    store.put("in/a.parquet", tmp_path / "a.parquet")
    source = ParquetSource(SourceConfig(kind="parquet", path=f"{s3}/in"))
    samples = [sample for _, sample in rows_of(source)]
    assert [sample.reason for sample in samples] == ["", "", NO_IMAGE, OUTSIDE, OUTSIDE, OUTSIDE]
    assert [sample.image for sample in samples[:2]] == [IMAGES[0]] * 2
    check_fetch(source)


def test_parquet_without_the_image_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"caption": "x"}] * 5)
    samples = [
        sample for _, sample in rows_of(ParquetSource(SourceConfig(kind="parquet", path=str(tmp_path))))
    ]
    assert [sample.reason for sample in samples] == [NO_COLUMN] * 5


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"fine"], pa.binary()).buffers())
    pa.parquet.write_table(
        pa.table({"image": [IMAGES[0], IMAGES[1]], "caption": broken}), tmp_path / "a.parquet"
    )
    samples = [
        sample for _, sample in rows_of(ParquetSource(SourceConfig(kind="parquet", path=str(tmp_path))))
    ]
    assert [sample.record["caption"] for sample in samples] == [b"a\xff", "fine"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_folder_with_metadata(store_uri, suffix):
    store = open_store(store_uri, create=True)
    for name in ("0.png", "sub/1.png", "unnamed.png"):
        store.put(name, IMAGES[0] if name == "0.png" else IMAGES[1])
    rows = [
        ("0.png", "zero"),
        ("sub/1.png", "one, with a comma"),
        ("absent.png", "two"),
        ("../x.png", "three"),
        ("", "four"),
    ]
    if suffix == "csv":
        text = "file_name,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows)
    else:
        text = (
            "".join(json.dumps({"file_name": name, "caption": caption}) + "\n" for name, caption in rows)
            + "{broken\n"
        )
    store.put(f"metadata.{suffix}", text.encode())
    source = FolderSource(SourceConfig(kind="folder", path=store_uri))
    assert source.inventory().names == ["."]
    samples = [sample for _, sample in rows_of(source)]
    reasons = ["", "", NO_IMAGE, OUTSIDE, NO_IMAGE] + ([BAD_LINE] if suffix == "jsonl" else []) + [""]
    assert [sample.reason for sample in samples] == reasons
    assert [sample.record.get("caption") for sample in samples[:2]] == ["zero", "one, with a comma"]
    assert samples[-1].key == "unnamed.png"
    check_fetch(source)


def test_folder_with_texts(tmp_path):
    for name, text in (("a/0", "zero"), ("b/1", "one\nline two"), ("b/2", None)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(IMAGES[0])
        if text:
            (tmp_path / f"{name}.txt").write_text(text)
    source = FolderSource(SourceConfig(kind="folder", path=str(tmp_path)))
    assert source.inventory().names == ["a", "b"]
    assert [sample.record.get("caption") for _, sample in rows_of(source)] == ["zero", "one\nline two", None]


def test_mds(store_uri, tmp_path):
    rows = [{"image": image, "caption": f"image {n}", "extra": n} for n, image in enumerate(IMAGES)]
    write_mds_folder(tmp_path / "written", rows, {"image": "bytes", "caption": "str", "extra": "int"})
    store = open_store(store_uri, create=True)
    for path in (tmp_path / "written").iterdir():
        store.put(f"in/{path.name}", path)
    source = MDSSource(SourceConfig(kind="mds", path=f"{store_uri}/in"))
    assert len(source.inventory().names) > 1
    samples = [sample for _, sample in rows_of(source)]
    assert [sample.image for sample in samples] == IMAGES
    assert [sample.record for sample in samples] == [{"caption": f"image {n}", "extra": n} for n in range(7)]
    check_fetch(source)
    shard = f"in/{source.inventory().names[-1]}"
    store.put(shard, store.read(shard)[:-100])
    samples = [sample for _, sample in rows_of(source)]
    assert len(samples) == 7
    assert samples[-1].reason == UNREADABLE


@pytest.mark.parametrize("kind", [pa.decimal128(6, 3), pa.decimal256(50, 3)], ids=str)
def test_filters_compare_decimals_of_parquet_as_numbers(tmp_path, kind):
    values = [Decimal("4.699"), Decimal("4.700"), Decimal("12"), None, Decimal("-5")]
    captions = [f"number {number}" for number in range(5)]
    table = pa.table({"image": IMAGES[:5], "caption": captions, "score": pa.array(values, kind)})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet")
    filters = [FilterConfig("min_value", 4.7, "score")]
    dataset = prepare(config_of(tmp_path, ("parquet", tmp_path / "in"), filters=filters))
    assert sorted(pair.captions[0][1] for pair in all_pairs(dataset)) == ["number 1", "number 2"]
    assert reasons_of(dataset) == {"min_value: score below 4.7": 2, "min_value: no score": 1}


def test_filters_compare_decimals_of_mds_as_numbers(tmp_path):
    rows = [
        {"image": IMAGES[number], "caption": f"number {number}", "score": Decimal(score)}
        for number, score in enumerate(["4.699", "4.7", "1E+1"])
    ]
    columns = {"image": "bytes", "caption": "str", "score": "str_decimal"}
    write_mds_folder(tmp_path / "in", rows, columns)
    filters = [FilterConfig("min_value", 4.7, "score")]
    dataset = prepare(config_of(tmp_path, ("mds", tmp_path / "in"), filters=filters))
    assert sorted(pair.captions[0][1] for pair in all_pairs(dataset)) == ["number 1", "number 2"]


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("{00000..00001}.tar", "*.tar"),
        ("{0,1}/{00000..00001}.tar", "*/*.tar"),
        ("part-{000..010}/a.tar", "part-*/a.tar"),
        ("shards-{0..1}", "shards-*"),
    ],
)
def test_braces_in_a_path_are_one_line_that_says_what_to_write(store_uri, path, instead):
    open_store(store_uri, create=True).put("00000.tar", tar_of([0]))
    with pytest.raises(UserError) as error:
        WebDatasetSource(SourceConfig(path=f"{store_uri}/{path}")).inventory()
    assert str(error.value).startswith(f"{store_uri}/{path}: ")
    assert str(error.value).endswith(f": braces are not expanded: write {store_uri}/{instead}")


def test_braces_that_are_part_of_a_name_are_read(tmp_path):
    write_tar(tmp_path, "{00000..00001}.tar", sample_members("0", IMAGES[0], {"caption": "x"}))
    source = WebDatasetSource(SourceConfig(path=str(tmp_path / "{00000..00001}.tar")))
    assert source.inventory().names == ["{00000..00001}.tar"]


def test_openmoji():
    source = OpenMojiSource(16)
    samples = list(source.read("openmoji", []))
    good = {sample.record["caption"]: sample for sample in samples if not sample.reason}
    assert len(good) > 3500
    assert {"backpack", "red apple", "flag: Ghana"} <= set(good)
    assert good["flag: Ghana"].record["flag"]
    assert not good["backpack"].record["flag"]
    backpack = good["backpack"]
    assert dict(source.fetch("openmoji", [backpack.place])) == {0: backpack.image}


@pytest.mark.parametrize("kind", [WebDatasetSource, ParquetSource, FolderSource, MDSSource])
def test_nothing_there_is_the_users_error(tmp_path, kind):
    with pytest.raises(UserError):
        kind(SourceConfig(path=str(tmp_path))).inventory()
    with pytest.raises(UserError):
        kind(SourceConfig(path=str(tmp_path / "absent"))).inventory()


def test_a_ranged_file_reads_like_a_file(s3):
    store = open_store(s3)
    data = bytes(range(256)) * 100
    store.put("x.bin", data)
    with SourceFiles(s3).open("x.bin") as file:
        assert file.read(10) == data[:10]
        assert file.seek(-20, 2) == len(data) - 20
        assert file.read() == data[-20:]
        file.seek(1000)
        assert file.read(5000) == data[1000:6000]


def test_a_bucket_is_listed_as_a_folder_is(s3):
    store = open_store(s3)
    for key in ("in/b c.tar", "in/a+%.tar", "in/x.txt"):
        store.put(key, tar_of([0]))
    # Other programs write objects that stand for folders, and hidden files.
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    for key in ("in/sub/", "in/sub.tar/", "in/.cache/y.tar", "in/.z.tar", "in/ta\tb.tar"):
        client = store._backend.client
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}".lstrip("/"), Body=b"")
    inventory = WebDatasetSource(SourceConfig(path=f"{s3}/in")).inventory()
    assert inventory.names == ["a+%.tar", "b c.tar"]
    assert inventory.ignored == {".txt": 1, HIDDEN: 2, BAD_NAME: 1}
    inventory.check(s3)


def test_an_object_that_is_too_large_is_not_read(s3):
    store = open_store(s3)
    store.put("in/1.png", IMAGES[0])
    files = SourceFiles(f"{s3}/in")
    assert files.read("1.png", len(IMAGES[0])) == IMAGES[0]
    with pytest.raises(RefusedError) as error:
        files.read("1.png", len(IMAGES[0]) - 1)
    assert error.value.reason == TOO_LARGE


def test_a_public_bucket_is_read_without_credentials(s3, monkeypatch):
    store = open_store(s3)
    store.put("in/1.png", IMAGES[0])
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    store._backend.client.put_object_acl(Bucket=bucket, Key=f"{prefix}/in/1.png", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="LI_DIT_S3_UNSIGNED=1 for a public bucket"):
        SourceFiles(f"{s3}/in").read("1.png")
    monkeypatch.setenv("LI_DIT_S3_UNSIGNED", "1")
    assert SourceFiles(f"{s3}/in").read("1.png") == IMAGES[0]
