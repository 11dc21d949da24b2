"""Images that rows name by path are read ahead in a bucket; order and faults stay as they were."""

import threading

import pytest

from data_prep.config import SourceConfig
from data_prep.sources.files import SourceFiles
from data_prep.sources.folder import FolderSource
from data_prep.sources.parquet import ParquetSource
from data_prep.store.s3 import S3Bucket
from data_prep.store.store import open_store
from tests.helpers.raw_material import png, write_parquet

IMAGES, AT_ONCE = 12, 8


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """Put a table of paths and its images into a bucket, whose reads wait until several are under way."""
    store = open_store(s3)
    for number in range(IMAGES):
        store.put(f"images/{number:02d}.png", png(number))
    write_parquet(
        tmp_path / "a.parquet",
        [{"image": f"images/{number:02d}.png", "caption": f"c{number}"} for number in range(IMAGES)],
    )
    store.put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    entered, enough = [], threading.Event()
    read = S3Bucket.read

    def wait(self, key, max_bytes=None):
        if key.endswith(".png"):
            entered.append(key)
            if len(entered) >= AT_ONCE:
                enough.set()
            assert enough.wait(60), f"only {len(entered)} reads at once"
        return read(self, key, max_bytes)

    monkeypatch.setattr(S3Bucket, "read", wait)
    return s3


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_images_in_a_bucket_are_read_several_at_once_and_in_order(bucket, kind):
    if kind == "parquet":
        samples = list(
            ParquetSource(SourceConfig(kind="parquet", path=bucket)).read("a.parquet", ["caption"])
        )
    else:
        samples = list(FolderSource(SourceConfig(kind="folder", path=bucket)).read("images", []))
    assert [sample.image for sample in samples] == [png(number) for number in range(IMAGES)]


def test_rows_before_a_fault_come_first(s3):
    def rows():
        yield from range(3)
        raise ValueError("damaged")

    came = []
    with pytest.raises(ValueError, match="damaged"):
        came.extend(SourceFiles(s3).read_ahead(rows(), lambda row: came.append(row) or row))
    assert sorted(came[:3]) == [0, 1, 2]


def test_a_reader_may_stop_early(s3):
    rows = SourceFiles(s3).read_ahead(iter(range(1000)), lambda row: row)
    assert [next(rows) for _ in range(5)] == list(range(5))
    rows.close()
