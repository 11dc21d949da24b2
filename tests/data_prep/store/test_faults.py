"""Faults of networks and endpoints are survived or reported, and never give wrong data."""

import itertools
import logging
import multiprocessing
import random
import time

import pytest
import xxhash

from data_prep.dataset.parts import commit_part, committed
from data_prep.dataset.schema import Part
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.verify import verify
from data_prep.store.faults import TransientError, retry_seconds, retrying
from data_prep.store.store import StoredFile, StoreError, open_store
from model.common.errors import UserError
from tests.helpers.fake_dataset import make_all
from tests.helpers.s3 import Fault

SMALL, LARGE = 10_000, 9_000_000
GETS = ["503", "500", "reset", "stall", "short", "flip", "lose_answer"]
PUTS = ["503", "500", "409", "lose_answer", "flip_upload", "flip_upload_lose_answer", "stall"]


def combinations(*faults):
    """Each fault with both sizes; a large object that stalls is slow."""
    for do, size in itertools.product(faults, (SMALL, LARGE)):
        yield pytest.param(do, size, marks=pytest.mark.slow if (do, size) == ("stall", LARGE) else ())


@pytest.fixture
def store(s3, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "12")  # a stall is then noticed after 1.2 s
    store = open_store(s3)
    yield store
    store.close()


def put(store, key, size):
    data = random.Random(size).randbytes(size)
    store.put(key, data)
    return data, StoredFile(key, size, xxhash.xxh64_hexdigest(data))


@pytest.mark.parametrize(("do", "size"), combinations(*GETS))
def test_faults_of_downloads_are_survived(store, proxy, tmp_path, do, size):
    data, file = put(store, "payload", size)
    for _ in range(2):
        proxy.faults = [Fault(do, "GET", "payload", times=2)]
        store.fetch(file, tmp_path / "payload")
        assert (tmp_path / "payload").read_bytes() == data
        assert proxy.faults[0].hits == 2
        if do == "stall":
            break
    if size == SMALL:
        proxy.faults = [Fault(do, "GET", "payload", times=1)]
        assert store.read("payload") == data


def test_a_broken_download_resumes_where_it_broke(store, proxy, tmp_path):
    data, file = put(store, "payload", LARGE)
    proxy.faults = [Fault("reset", "GET", "payload", times=4)]
    proxy.requests.clear()
    store.fetch(file, tmp_path / "payload")
    assert (tmp_path / "payload").read_bytes() == data
    assert [fault for _, _, fault in proxy.requests] == ["reset"] * 4 + [""]


@pytest.mark.parametrize(("do", "size"), combinations(*PUTS))
def test_faults_of_uploads_are_survived(store, proxy, tmp_path, do, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert store.put_new("probed", b"")
    for number, source in enumerate((data, tmp_path / "file")):
        proxy.faults = [Fault(do, "PUT", f"up{number}", times=2)]
        store.put(f"up{number}", source)
        assert store.read(f"up{number}") == data
    proxy.faults = [Fault(do, "PUT", "new", times=2)]
    assert store.put_new("new", data)
    assert not store.put_new("new", b"other")
    assert store.read("new") == data


@pytest.mark.parametrize("do", ["503", "reset", "lose_answer", "short"])
def test_faults_in_listings_are_survived(store, proxy, do):
    for number in range(3):
        store.put(f"list/{number}", b"")
    proxy.faults = [Fault(do, "GET", "list-type", times=2)]
    assert list(store.list("list/")) == [f"list/{number}" for number in range(3)]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_ranged_reads_of_a_source_are_survived(store, proxy, size):
    """Only the number of a source's bytes is checked; a flipped byte is noticed by the plan's hash of the
    image."""
    data, _ = put(store, "payload", size)
    for do in ("503", "500", "reset", "short", "lose_answer"):
        proxy.faults = [Fault(do, "GET", "payload", times=2)]
        assert store.read_range("payload", 17, size // 2) == data[17 : 17 + size // 2]
        assert proxy.faults[0].hits == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_storm_is_waited_out(s3, proxy, tmp_path, monkeypatch, seconds):
    """Every request fails for `seconds`; the case of one minute has the ten minutes of retries of a real
    job."""
    if seconds == 3:
        monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "12")
    else:
        monkeypatch.delenv("LI_DIT_RETRY_SECONDS", raising=False)
    store = open_store(s3)
    dataset = store.sub("ds")
    data, file = put(store, "payload", SMALL)
    make_all(dataset, {"64x64": [2]})
    proxy.faults = [Fault("503", seconds=seconds)]
    began = time.monotonic()
    store.fetch(file, tmp_path / "payload")
    assert time.monotonic() - began > seconds
    assert (tmp_path / "payload").read_bytes() == data
    proxy.faults = [Fault("503", seconds=seconds)]
    began = time.monotonic()
    snapshot = take_snapshot(dataset)
    assert time.monotonic() - began > seconds
    proxy.faults = []
    assert take_snapshot(dataset).id == snapshot.id
    assert verify(dataset, deep=True).problems == []
    store.close()


def test_retries_go_on_for_ten_minutes_unless_shortened(monkeypatch):
    monkeypatch.delenv("LI_DIT_RETRY_SECONDS", raising=False)
    assert retry_seconds() == 600
    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waits = []

    def fail():
        waits.append(clock[0])
        raise TransientError("503")

    with pytest.raises(StoreError, match="tries in 6"):
        retrying("s3://bucket/key")(fail)
    steps = [after - before for before, after in itertools.pairwise(waits)]
    assert clock[0] >= 600
    assert max(steps) <= 30
    assert len({round(step, 6) for step in steps}) > len(steps) / 2, "waits have jitter"
    assert sum(steps[:3]) < 8, "and begin short"


def test_time_before_the_first_fault_does_not_count_against_the_retries(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def download():
        clock[0] += 1000
        if clock[0] < 1500:
            raise TransientError("reset")
        return "all of it"

    assert retrying("s3://bucket/key")(download) == "all of it"


def test_a_fault_that_stays_is_an_error_that_names_the_object(store, proxy, tmp_path, monkeypatch, caplog):
    _, file = put(store, "payload", SMALL)
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    store.close()
    for do in ("503", "flip", "reset"):
        proxy.faults = [Fault(do, path="payload")]
        for use in (lambda: store.fetch(file, tmp_path / "target"), lambda: store.read("payload")):
            began = time.monotonic()
            with pytest.raises(StoreError, match="/payload") as error:
                use()
            assert time.monotonic() - began < 10
            assert "not-to-be-seen" not in str(error.value) + caplog.text
    assert any("next in" in record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_not_retried(store, proxy):
    store.put("payload", b"x")
    proxy.faults = [Fault("403", path="payload")]
    began = time.monotonic()
    for use in (store.read, store.size, store.exists, store.delete):
        with pytest.raises(UserError, match="credentials"):
            use("payload")
    assert time.monotonic() - began < 3


def test_an_object_damaged_at_rest_is_never_accepted(store, tmp_path):
    data, file = put(store, "payload", LARGE)
    store.put("payload", data[:-1] + bytes([data[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"payload.*damaged"):
            store.fetch(file, tmp_path / "target")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("do", ["ignore_condition", "refuse_condition"])
def test_an_endpoint_without_conditional_puts_is_named_and_survived(store, proxy, caplog, do):
    proxy.faults = [Fault(do, "PUT")]
    assert store.put_new("commit", b"first")
    assert not store.put_new("commit", b"second")
    assert store.put_new("other", b"first")
    assert store.read("commit") == b"first"
    assert sum("If-None-Match" in record.message for record in caplog.records) == 1
    assert list(store.entries("")) == [
        ("commit", pytest.approx(time.time(), abs=60)),
        ("other", pytest.approx(time.time(), abs=60)),
    ]


def test_an_endpoint_with_conditional_puts_is_asked_once(store, proxy, caplog):
    for number in range(3):
        assert store.put_new(f"commit{number}", b"")
    assert sum(method == "PUT" for method, _, _ in proxy.requests) == 5
    assert not caplog.records


def _commit(uri, number, folder):
    path = folder / f"payload-{number}"
    path.write_bytes(b"%d" % number * 1000)
    commit_part(open_store(uri), "llm", Part("64x64", 0), {"s": path}, [1], {"by": number}, "h")


@pytest.mark.timeout(60)
def test_writers_that_race_without_conditional_puts_leave_one_whole_commit(store, s3, proxy, tmp_path):
    proxy.faults = [Fault("ignore_condition", "PUT")]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_commit, args=(s3, number, tmp_path)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(50)
    assert [child.exitcode for child in children] == [0] * 4
    (commit,) = committed(store, "llm").values()
    store.fetch(commit.files[0], tmp_path / "payload")
    assert (tmp_path / "payload").read_bytes() == b"%d" % commit.counts["by"] * 1000


class RandomFaults(Fault):
    """Random faults, for a share of all requests."""

    def __init__(self, seed, share):
        super().__init__("")
        self.random, self.share = random.Random(seed), share

    def strikes(self, method, path):
        if self.random.random() > self.share:
            return False
        uploads = ["503", "500", "lose_answer", "flip_upload"]
        self.do = self.random.choice(
            uploads if method == "PUT" else ["503", "500", "reset", "short", "flip", "lose_answer"]
        )
        # A flipped byte in a listing is only noticed if it breaks the XML.
        if "list-type" in path and self.do == "flip":
            self.do = "503"
        self.hits += 1
        return True


@pytest.mark.timeout(120)
def test_a_dataset_made_under_faults_equals_one_made_without(store, proxy, tmp_path):
    buckets = {"64x64": [2, 1], "32x96": [1]}
    proxy.faults = [RandomFaults(7, 0.15)]
    make_all(store.sub("ds"), buckets)
    snapshot = take_snapshot(store.sub("ds"))
    assert proxy.faults[0].hits > 10
    proxy.faults = []
    assert verify(store.sub("ds"), deep=True).problems == []
    local = open_store(str(tmp_path / "store"), create=True).sub("ds")
    make_all(local, buckets)
    assert take_snapshot(local).id == snapshot.id


def test_a_full_disk_is_named(s3, tmp_path, full_disk):
    local, remote = open_store(str(tmp_path / "store"), create=True), open_store(s3)
    data, file = put(remote, "payload", 200_000)
    with full_disk(100_000):
        with pytest.raises(UserError, match=str(tmp_path / "store" / "a" / "payload")):
            local.put("a/payload", data)
        with pytest.raises(UserError, match=str(tmp_path / "store" / "a" / "commit")):
            local.put_new("a/commit", data)
        with pytest.raises(UserError, match=str(tmp_path / "cache" / "target")):
            remote.fetch(file, tmp_path / "cache" / "target")
    assert list(local.entries("")) == []
    assert not list((tmp_path / "cache").iterdir())
