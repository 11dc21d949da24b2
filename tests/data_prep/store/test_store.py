"""A store keeps objects completely or not at all and lets one writer win, in a folder as in S3."""

import multiprocessing
import os
import pickle
import threading

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.store import s3 as store_s3
from data_prep.store.store import StoredFile, StoreError, open_store
from model.common.errors import UserError


def stored(key, data):
    return StoredFile(key, len(data), xxhash.xxh64_hexdigest(data))


def test_objects_round_trip(store, tmp_path):
    (tmp_path / "file").write_bytes(b"from a file")
    store.put("a/b/one", b"1")
    store.put("a/b/two", tmp_path / "file")
    assert store.read("a/b/one") == b"1"
    assert store.read("a/b/two") == b"from a file"
    assert store.size("a/b/two") == 11
    assert store.exists("a/b/one")
    assert not store.exists("a/b")
    store.put("a/b/one", b"")
    assert store.read("a/b/one") == b""
    store.delete("a/b/one")
    store.delete("a/b/one")
    assert list(store.list("a/")) == ["a/b/two"]
    with pytest.raises(FileNotFoundError):
        store.read("a/b/one")
    with pytest.raises(FileNotFoundError):
        store.size("a/b/one")
    with pytest.raises(FileNotFoundError):
        store.fetch(stored("a/b/one", b""), tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(
    st.sets(st.text("ab/", min_size=1, max_size=5).filter(lambda k: all(k.split("/"))), max_size=8),
    st.text("ab/", max_size=3),
)
def test_listing_is_by_prefix_and_sorted(store, keys, prefix):
    # A folder cannot hold both an object and objects below its name; none of our layouts has that.
    keys = {key for key in keys if not any(other.startswith(key + "/") for other in keys)}
    if prefix.startswith("/") or "//" in prefix:
        return
    inner = store.sub(f"listing-{os.urandom(4).hex()}")
    for key in keys:
        inner.put(key, b"x")
    assert list(inner.list(prefix)) == sorted(key for key in keys if key.startswith(prefix))
    below_a = [key.split("/") for key in keys if key.startswith("a/")]
    assert inner.folders("a/") == sorted({names[1] for names in below_a if len(names) > 2})


def test_pages_of_a_long_listing_are_joined(store, monkeypatch):
    monkeypatch.setattr(store_s3, "PAGE_KEYS", 3)
    for number in range(10):
        store.put(f"long/{number:05d}/x", b"")
    keys = list(store.list("long/"))
    assert len(keys) == 10
    assert [f"long/{name}/x" for name in store.folders("long/")] == keys == sorted(keys)


def test_a_sub_store_sees_only_its_prefix(store):
    inner = store.sub("one").sub("two")
    inner.put("key", b"inner")
    store.put("one/twofold", b"outer")
    assert store.read("one/two/key") == b"inner"
    assert list(inner.list("")) == ["key"]
    assert inner.uri == store.uri + "/one/two"


@pytest.mark.parametrize(
    "key", ["", "/a", "../a", "a/../b", "a//b", "a/", "a\\b", "a\0b", "a\nb", "./a", "x" * 300]
)
def test_keys_cannot_lead_out_of_the_store(store, key):
    for use in (store.read, store.exists, store.delete, store.sub, store.local_path):
        with pytest.raises(UserError, match="key"):
            use(key)
    for use in (store.put, store.put_new):
        with pytest.raises(UserError, match="key"):
            use(key, b"")


def test_hidden_names_are_not_written(store):
    with pytest.raises(UserError, match="dot"):
        store.put("a/.tmp-1", b"")


def test_put_new_never_replaces(store):
    assert store.put_new("k", b"first")
    assert not store.put_new("k", b"second")
    assert store.read("k") == b"first"
    assert list(store.entries("")) == [("k", pytest.approx(next(store.entries(""))[1]))]


def test_one_of_many_threads_wins(store):
    wins = []

    def write(number):
        wins.append((store.put_new("race", b"%d" % number), number))

    threads = [threading.Thread(target=write, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [n for won, n in wins if won]
    assert store.read("race") == b"%d" % winner


def test_fetch_checks_size_and_hash_before_the_name_appears(store, tmp_path):
    data = os.urandom(3_000_000)
    store.put("payload", data)
    store.fetch(stored("payload", data), tmp_path / "deep" / "target")
    assert (tmp_path / "deep" / "target").read_bytes() == data
    for wrong in (
        stored("payload", data[:-1]),
        stored("payload", data + b"x"),
        stored("payload", b"y" + data[1:]),
    ):
        with pytest.raises(StoreError, match="payload"):
            store.fetch(wrong, tmp_path / "deep" / "bad")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def test_local_path_is_the_file(store):
    store.put("a/b", b"data")
    path = store.local_path("a/b")
    assert path is None or path.read_bytes() == b"data"


def test_a_pickled_store_works(store):
    store.put("k", b"v")
    assert pickle.loads(pickle.dumps(store)).read("k") == b"v"


def _read_often(store, number, wrong):
    for _ in range(30):
        if store.read(f"k{number}") != b"%d" % number * 1000:
            wrong.value += 1


@pytest.mark.timeout(60)
def test_forked_children_do_not_share_connections(store):
    """With one keep-alive connection in two processes, a process would receive the other's bytes."""
    for number in range(4):
        store.put(f"k{number}", b"%d" % number * 1000)
    context = multiprocessing.get_context("fork")
    wrong = context.Value("i", 0)
    children = [context.Process(target=_read_often, args=(store, number, wrong)) for number in range(4)]
    for child in children:
        child.start()
    _read_often(store, 0, wrong)
    for child in children:
        child.join(50)
    assert [child.exitcode for child in children] == [0] * 4
    assert wrong.value == 0


def test_a_missing_store_is_named(tmp_path, s3):
    for uri in (str(tmp_path / "none"), "s3://no-such-bucket-anywhere/x", "gs://bucket/x", "s3://", ""):
        with pytest.raises(UserError, match=(uri or "store").split("/x")[0]):
            open_store(uri)
    assert not (tmp_path / "none").exists()


def test_missing_credentials_are_an_error_of_one_line(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="credentials"):
        open_store(s3)


def test_profiles_and_unknown_profiles(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text("[cluster]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "cluster")
    assert open_store(s3).put_new("k", b"")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(UserError, match="other"):
        open_store(s3)
