"""An endpoint that is down, lies or refuses: right data after retries, or one line that says why."""

import re
import time
from email.utils import formatdate

import boto3
import pytest

from data_prep.dataset.schema import Manifest
from data_prep.dataset.snapshot import take_snapshot
from data_prep.dataset.snapshot_reader import read_snapshot
from data_prep.store.faults import StoreError, TransientError, retrying
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.fake_dataset import make_all
from tests.helpers.s3 import CREDENTIALS, Fault

HTML = (200, [("Content-Type", "text/html")], b"<html><body>busy, try later</body></html>")
EMPTY = (200, [], b"")
SLOW_DOWN = (200, [], b"<Error><Code>SlowDown</Code></Error>")
FOREIGN = {"html": HTML, "empty": EMPTY, "error": SLOW_DOWN}


def refusal(status, code, *headers):
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>" if code else ""
    return status, list(headers), body.encode()


@pytest.fixture
def store(s3, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "4")
    store = open_store(s3)
    store.put("folder/one", b"content")
    yield store
    store.close()


OPERATIONS = {
    "read": lambda store: store.read("folder/one"),
    "range": lambda store: store.read_range("folder/one", 1, 3),
    "size": lambda store: store.size("folder/one"),
    "list": lambda store: list(store.list("folder/")),
    "folders": lambda store: store.folders("folder/"),
    "put": lambda store: store.put("folder/two", b"2"),
    "put_new": lambda store: store.put_new("folder/three", b"3"),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_an_answer_that_is_not_of_s3_is_asked_for_again(store, proxy, name, kind):
    store.put_new("folder/probed", b"")
    right = None if name.startswith("put") else OPERATIONS[name](store)
    proxy.faults = [Fault("answer", path="folder", times=2, answer=FOREIGN[kind])]
    result = OPERATIONS[name](store)
    assert proxy.faults[0].hits == 2
    if name == "put":
        assert store.read("folder/two") == b"2"
    elif name == "put_new":
        assert result
        assert store.read("folder/three") == b"3"
    else:
        assert result == right


def test_an_endpoint_without_etags_is_checked_by_reading(store, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    proxy.faults = [Fault("answer", "PUT", answer=EMPTY)]
    with pytest.raises(StoreError, match="has no such object"):
        store.put("folder/two", b"2")


@pytest.mark.parametrize("operation", ["read", "size", "list", "put"])
def test_an_endpoint_that_is_down_for_a_while_is_waited_for(s3, proxy, monkeypatch, operation):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "4")
    store = open_store(s3)
    store.put("folder/one", b"content")
    store.close()
    # Reads through obstore do not notice that boto3's way is down.
    monkeypatch.setattr(store._backend._connected.fast, "_store", None)
    client = store._backend.client
    real, tries = client._endpoint.http_session.send, []

    from botocore import exceptions as aws

    faults = [
        aws.EndpointConnectionError(endpoint_url=proxy.url, error="refused"),
        aws.ConnectTimeoutError(endpoint_url=proxy.url),
        aws.SSLError(endpoint_url=proxy.url, error="handshake"),
        aws.ProxyConnectionError(proxy_url=proxy.url),
        aws.ConnectionClosedError(endpoint_url=proxy.url),
    ]

    def send(request):
        tries.append(request)
        if len(tries) <= len(faults):
            raise faults[len(tries) - 1]
        return real(request)

    monkeypatch.setattr(client._endpoint.http_session, "send", send)
    OPERATIONS[operation](store)
    assert len(tries) > len(faults)


def test_an_endpoint_that_stays_down_is_one_line_without_its_password(s3, monkeypatch, caplog):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    for variable in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
        monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
        with pytest.raises(StoreError, match="EndpointConnectionError") as error:
            open_store(s3)
        shown = [str(error.value), caplog.text, str(error.value.__cause__), repr(error.value.__cause__)]
        assert "secret" not in "".join(shown)
        assert "127.0.0.1" in shown[0]
    monkeypatch.setenv("S3_ENDPOINT_URL", "user:secret@host")
    with pytest.raises(UserError, match="not a URL") as error:
        open_store(s3)
    assert "secret" not in str(error.value)


def test_an_address_with_a_password_still_works(s3, s3_url, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", s3_url.replace("://", "://user:secret@"))
    store = open_store(s3)
    store.put("one", b"1")
    assert store.read("one") == b"1"


def test_an_expired_token_is_tried_again_on_every_operation(store, proxy):
    store.put_new("folder/probed", b"")
    for name, operation in OPERATIONS.items():
        answer = refusal(400, "" if name == "size" else "ExpiredToken")
        proxy.faults = [Fault("answer", times=2, answer=answer)]
        operation(store)
        assert proxy.faults[0].hits == 2


@pytest.mark.parametrize("name", ["read", "size", "put", "list"])
def test_a_wrong_clock_is_named(store, proxy, name):
    date = ("Date", formatdate(time.time() - 7200, usegmt=True))
    answer = refusal(403, "" if name == "size" else "RequestTimeTooSkewed", date)
    proxy.faults = [Fault("answer", answer=answer)]
    with pytest.raises(UserError, match=r"this machine's clock is \+7,[12]\d\d s from the endpoint's"):
        OPERATIONS[name](store)


@pytest.mark.parametrize("name", ["read", "size", "put", "list"])
def test_missing_rights_are_no_matter_of_the_clock(store, proxy, name):
    proxy.faults = [Fault("answer", answer=refusal(403, "AccessDenied"))]
    with pytest.raises(UserError, match="check the credentials"):
        OPERATIONS[name](store)


@pytest.mark.parametrize("status", [301, 400])
def test_another_region_is_named(store, proxy, status):
    code = {301: "PermanentRedirect", 400: "AuthorizationHeaderMalformed"}[status]
    answer = refusal(status, code, ("x-amz-bucket-region", "eu-north-1"))
    proxy.faults = [Fault("answer", answer=answer)]
    for name in ("read", "put", "list"):
        with pytest.raises(UserError, match="another region: set AWS_REGION=eu-north-1"):
            OPERATIONS[name](store)


def test_the_stores_clock_is_the_endpoints(store, proxy):
    proxy.faults = [Fault("answer", "HEAD", answer=(200, [("Date", formatdate(1e9, usegmt=True))], b""))]
    assert store.now() == 1e9


@pytest.mark.parametrize("value", ["7", "a date", "soon", "-3", ""])
def test_retry_after_is_kept_within_the_budget(store, proxy, monkeypatch, value):
    # not a parameter: each process of the tests would collect another one
    value = formatdate(time.time() + 3600, usegmt=True) if value == "a date" else value
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "600")
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    # Its own try, without a wait, would take one of the three answers.
    monkeypatch.setattr(store._backend._connected.fast, "_store", None)
    proxy.faults = [Fault("answer", "GET", times=3, answer=refusal(503, "SlowDown", ("Retry-After", value)))]
    assert store.read("folder/one") == b"content"
    assert len(waits) == 3
    if value == "7":
        assert all(7 <= wait <= 30 for wait in waits)
    elif value.endswith("GMT"):
        assert waits == [60.0] * 3
    else:
        assert all(wait <= 30 for wait in waits)


def test_a_wait_that_is_asked_for_counts(monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "600")
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    results = iter([TransientError("503", 50.0), TransientError("503"), None])

    def call():
        result = next(results)
        if result:
            raise result
        return "done"

    assert retrying("s3://bucket/key")(call) == "done"
    assert waits[0] == 50.0
    assert waits[1] < 30


def backwards(data):
    """Return a listing with its entries in the opposite order, and the first one twice."""
    entries = re.findall(rb"<Contents>.*?</Contents>|<CommonPrefixes>.*?</CommonPrefixes>", data, re.DOTALL)
    if not entries:
        return data
    start, end = data.index(entries[0]), data.index(entries[-1]) + len(entries[-1])
    return data[:start] + b"".join([*entries[::-1], entries[0]]) + data[end:]


def test_listings_are_sorted_and_unique(store, proxy):
    for name in "abc":
        store.put(f"list/{name}/{name}", b"")
    proxy.faults = [Fault("edit", "GET", "list-type", edit=backwards)]
    assert list(store.list("list/")) == [f"list/{name}/{name}" for name in "abc"]
    assert store.folders("list/") == ["a", "b", "c"]


def test_the_latest_snapshot_is_the_newest_in_any_order_of_a_listing(store, proxy):
    dataset = store.sub("ds")
    make_all(dataset, {"64x64": [2]})
    proxy.faults = [Fault("edit", "GET", "list-type", edit=backwards)]
    for families in (None, ["llm"], ["latents"]):
        assert take_snapshot(dataset, families) == read_snapshot(dataset)


@pytest.mark.parametrize("key", ["../../etc/passwd", "other/key", "fold"])
def test_keys_outside_of_the_prefix_are_refused(store, proxy, monkeypatch, key):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    name = re.escape(f"{store._prefix}folder/one").encode()
    edit = lambda data: re.sub(name, key.encode(), data)  # noqa: E731
    proxy.faults = [Fault("edit", "GET", "list-type", edit=edit)]
    with pytest.raises(StoreError, match="outside of the prefix"):
        list(store.list("folder/"))


def test_a_listing_that_repeats_itself_ends(store, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "1")
    page = "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
    answer = 200, [], f"<ListBucketResult>{page}</ListBucketResult>".encode()
    proxy.faults = [Fault("answer", "GET", "list-type", answer=answer)]
    with pytest.raises(StoreError, match="not a listing"):
        list(store.list("folder/"))


def test_a_record_that_was_copied_without_its_hash_is_read_again(store, proxy, s3_url):
    """A page of a proxy may have all that an object has; then only its content shows that it is none."""
    dataset = store.sub("ds")
    dataset.put(Manifest.KEY, Manifest("ds", ["original"], {"64x64": [1]}).to_json())
    keys = {name.lower(): value for name, value in CREDENTIALS.items() if "KEY" in name}
    client = boto3.client("s3", endpoint_url=s3_url, region_name="us-east-1", **keys)
    bucket, key = store._backend.bucket, f"{dataset._prefix}{Manifest.KEY}"
    client.put_object(Bucket=bucket, Key=key, Body=dataset.read(Manifest.KEY))
    from data_prep.dataset.parts import read_plan

    for edit in (lambda data: b"", lambda data: b"<html>busy</html>"):
        proxy.faults = [Fault("edit", "GET", "manifest.json", times=1, edit=edit)]
        assert read_plan(dataset).buckets == {"64x64": [1]}
        assert proxy.faults[0].hits == 1
