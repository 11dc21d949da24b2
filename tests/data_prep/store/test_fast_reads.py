"""Small reads through obstore: the same bytes as through boto3, which is asked whenever anything is odd."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.store import fast_reads
from data_prep.store.fast_reads import MAX_FAILURES, FastReads
from data_prep.store.faults import TooLargeError
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.s3 import BUCKET, CREDENTIALS, Fault


@pytest.fixture
def store(s3, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "12")
    store = open_store(s3)
    yield store
    store.close()


@pytest.fixture
def asked(store, monkeypatch):
    """Names of the requests that boto3 makes."""
    calls = []
    client = store._backend.client
    client.meta.events.register("before-send.s3.GetObject", lambda **_: calls.append("get"))
    return calls


def raw(url):
    """A client that writes objects as other programs do."""
    return boto3.client("s3", endpoint_url=url)


def test_own_objects_and_ranges_do_not_go_through_boto3(store, asked):
    for data in (b"a record", b""):
        store.put("a/record.json", data)
        assert store.read("a/record.json") == data
    store.put("a/tar", bytes(range(256)))
    assert store.read_range("a/tar", 16, 32) == bytes(range(16, 48))
    assert store.read("a/tar", max_bytes=256) == bytes(range(256))
    assert asked == []


@given(st.integers(0, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_that_of_the_object(store, start, length):
    data = bytes(range(200))
    if not store.exists("tar"):
        store.put("tar", data)
    assert store.read_range("tar", start, length) == data[start : start + length]


def test_what_is_odd_is_asked_again(store, asked, proxy):
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.read_range("nothing", 0, 4)
    assert len(asked) == 2

    # too large, and past the end
    store.put("large", b"x" * 100)
    with pytest.raises(TooLargeError):
        store.read("large", max_bytes=99)
    assert len(asked) == 3
    assert store.read_range("large", 90, 20) == b"x" * 10
    assert store.read_range("large", 100, 20) == b""
    assert len(asked) == 3


def test_objects_of_other_programs_are_read_once_and_pages_of_proxies_again(store, asked, proxy):
    client = raw(proxy.url)
    for data in (b"others wrote this", b""):
        client.put_object(Bucket=BUCKET, Key=f"{store._prefix}other", Body=data)
        before = len(proxy.requests)
        assert store.read("other") == data
        assert len(proxy.requests) == before + 1
    assert asked == []
    client.put_object(Bucket=BUCKET, Key=f"{store._prefix}other", Body=b"others wrote this")
    page = Fault("answer", method="GET", times=1, answer=(200, [("Content-Type", "text/html")], b"<p>log in"))
    for fault in (page, Fault("reset", method="GET", times=1)):
        proxy.faults = [fault]
        assert store.read("other") == b"others wrote this"
    assert asked == ["get", "get"]


def test_a_byte_that_changed_on_the_way_is_noticed(store, asked, proxy):
    store.put("record", b"right" * 100)
    proxy.faults = [Fault("flip", method="GET", times=1)]
    assert store.read("record") == b"right" * 100
    assert asked == ["get"]


@pytest.fixture
def clock(monkeypatch):
    seconds = [1000.0]
    monkeypatch.setattr(fast_reads, "monotonic", lambda: seconds[0])
    return seconds


def test_after_some_failures_in_a_row_boto3_reads_alone_for_a_growing_while(store, asked, proxy, clock):
    store.put("record", b"data")

    def read(fault):
        """Read once, and return the number of requests of obstore and of boto3."""
        proxy.faults = [Fault("reset", method="GET", times=1)] if fault else []
        before, asked_before = len(proxy.requests), len(asked)
        assert store.read("record") == b"data"
        by_boto3 = len(asked) - asked_before
        return len(proxy.requests) - before - by_boto3, by_boto3

    for _ in range(MAX_FAILURES):
        assert read(fault=True) == (1, 1)
    pauses = [5, 10, 20, 40, 80, 160, 320, 600, 600]
    for pause in pauses:
        clock[0] += pause - 0.1
        assert read(fault=False) == (0, 1)
        clock[0] += 0.2
        # the first failure after a pause begins the next one
        assert read(fault=True) == (1, 1)
        assert read(fault=False) == (0, 1)

    # a success ends it, and the next pause is short again
    clock[0] += 600
    assert read(fault=False) == (1, 0)
    for _ in range(MAX_FAILURES):
        assert read(fault=True) == (1, 1)
    clock[0] += 5.1
    assert read(fault=False) == (1, 0)


def test_a_burst_of_refusals_pauses_many_threads_once(store, asked, proxy, clock):
    for number in range(64):
        store.put(f"records/{number}", b"%d" % number)
    proxy.faults = [Fault("503", method="GET", times=40)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda number: store.read(f"records/{number}"), range(64)))
    assert found == [b"%d" % number for number in range(64)]
    clock[0] += 5.1
    assert store._backend._connected.fast.active
    proxy.faults, before = [], len(asked)
    assert store.read("records/7") == b"7"
    assert len(asked) == before


def test_boto3_alone_is_a_setting(s3, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_S3_CLIENT", "boto3")
    store = open_store(s3)
    store.put("record", b"data")
    assert (store.read("record"), store.read_range("record", 1, 2)) == (b"data", b"at")
    assert not store._backend._connected.fast.active
    store.close()
    monkeypatch.setenv("LI_DIT_S3_CLIENT", "boto")
    with pytest.raises(UserError, match="LI_DIT_S3_CLIENT: not a client: write boto3"):
        open_store(s3)


def test_a_success_forgives_earlier_failures(store, asked, proxy):
    store.put("record", b"data")
    for _ in range(MAX_FAILURES + 1):
        proxy.faults = [Fault("reset", method="GET", times=1)]
        assert store.read("record") == b"data"
        proxy.faults = []
        assert store.read("record") == b"data"
    assert len(asked) == MAX_FAILURES + 1


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_certificates_that_only_botocore_reads_are_left_to_it(monkeypatch, tmp_path, variable):
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    client, session = raw("https://127.0.0.1:9"), boto3.Session()
    assert FastReads("bucket", client, session, "xxh64", 1.0)._store is not None
    monkeypatch.setenv(variable, str(tmp_path / "own.pem"))
    assert FastReads("bucket", client, session, "xxh64", 1.0)._store is None


def _read_forked(store, answers):
    answers.put((store.read("record"), store._backend._connected.fast._store is None))


def test_a_fork_reads_through_boto3(store, asked):
    """It has none of the threads of obstore, and would wait for them forever."""
    store.put("record", b"data")
    assert store.read("record") == b"data"
    assert asked == []

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_read_forked, args=(store, answers))
    process.start()
    try:
        assert answers.get(timeout=60) == (b"data", True)
    finally:
        process.kill()
        process.join()
    assert store.read("record") == b"data"
    assert asked == []


def test_reads_after_a_pickle_are_those_of_the_new_process(store, asked):
    import pickle

    store.put("record", b"data")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("record") == b"data"
    copy.close()
