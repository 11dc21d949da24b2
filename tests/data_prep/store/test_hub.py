"""Datasets of the hub are read as if they were local, through faults, and are never written."""

import io
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import BucketConfig, DatasetConfig, SourceConfig
from data_prep.dataset.parts import read_plan, read_plan_record
from data_prep.plan.manifest import read_manifest
from data_prep.plan.plan import run_plan
from data_prep.store.faults import TooLargeError
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.hub import COMMIT, Hub
from tests.helpers.raw_material import ALONE, png

NAME = "owner/some-set"
URI = f"hf://{NAME}@{COMMIT}"


def table(first, rows):
    sink = io.BytesIO()
    images = [{"bytes": png(first + row, 40, 40), "path": f"{row}.png"} for row in range(rows)]
    captions = [f"thing {first + row}" for row in range(rows)]
    pq.write_table(pa.table({"image": images, "text": captions}), sink, row_group_size=2)
    return sink.getvalue()


FILES = {
    "data/train-0.parquet": table(0, 5),
    "data/train-1.parquet": table(10, 4),
    "data/test-0.parquet": table(20, 3),
    "README.md": b"# A set",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "5")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def serve(monkeypatch):
    """Return a function that starts a hub with faults."""
    hubs = []

    def start(fault=lambda number, path: ""):
        hubs.append(Hub(NAME, FILES, fault))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].url)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


def test_files_are_listed_and_read_like_local_ones(serve, tmp_path):
    hub = serve()
    with closing(open_store(URI)) as store:
        assert list(store.list("")) == sorted(FILES)
        assert list(store.list("data/train")) == ["data/train-0.parquet", "data/train-1.parquet"]
        assert list(store.folders("data/")) == []
        for name, data in FILES.items():
            assert store.read(name) == data
            assert store.size(name) == len(data)
            assert store.version(name)
            assert store.read_range(name, 3, 100) == data[3:103]
            assert store.read_range(name, len(data) - 2, 100) == data[-2:]
            assert store.read_range(name, len(data), 100) == b""
        with pytest.raises(TooLargeError):
            store.read("README.md", 3)
        with pytest.raises(FileNotFoundError):
            store.read("nothing.md")
        for write in (store.put, store.put_new):
            with pytest.raises(UserError, match="are only read"):
                write("a", b"")
    with closing(open_store(f"{URI}/data")) as inner:
        assert inner.read("test-0.parquet") == FILES["data/test-0.parquet"]
    assert hub.requests


def plan_of(tmp_path, name, path):
    config = DatasetConfig(
        name=name,
        store=str(tmp_path / "store"),
        sources=[SourceConfig(kind="parquet", path=path, captions={"original": "text"})],
        buckets=BucketConfig(resolution=32, max_aspect=1, step=32),
        part_rows=4,
        workers=0,
    )
    dataset = open_store(config.store, create=True).sub(name)
    run_plan(config, dataset, ALONE)
    hashes = read_plan_record(dataset)["manifest"]
    rows = []
    for part in read_plan(dataset).parts:
        rows += read_manifest(dataset, part, hashes).to_pylist()
    return rows


def test_a_plan_of_the_hub_is_that_of_the_same_files_on_this_machine_through_all_faults(serve, tmp_path):
    local = tmp_path / "local"
    for name, data in FILES.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    faults = {number: ("cut", 503, 429, 500)[number % 4] for number in range(3, 40, 3)}
    hub = serve(lambda number, path: faults.get(number, "") if "/api/" not in path or number > 2 else "")
    rows = plan_of(tmp_path, "far", f"{URI}/data/train-*.parquet")
    assert rows == plan_of(tmp_path, "near", f"{local}/data/train-*.parquet")
    assert len(rows) == 9
    assert any("/resolve/" in path for path in hub.requests)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"hf://{NAME}", "40-digit commit"),
        (f"hf://{NAME}@main/data", "40-digit commit"),
        ("hf://name@" + COMMIT, "40-digit commit"),
        (f"hf://owner/other@{COMMIT}", "accept its terms"),
    ],
)
def test_wrong_addresses(serve, uri, message):
    serve()
    with pytest.raises(UserError, match=message):
        open_store(uri)


def test_a_hub_that_is_down_is_no_damaged_file(serve, tmp_path, monkeypatch):
    """Rows of a file that cannot be fetched must not be dropped for good."""
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    serve(lambda number, path: 503 if "/resolve/" in path else "")
    with pytest.raises(UserError, match="HTTP 503"):
        plan_of(tmp_path, "down", f"{URI}/data/train-*.parquet")
