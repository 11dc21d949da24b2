"""Fixtures that several packages use: a real S3 API on loopback, with and without faults, and stores of both kinds."""

import uuid

import boto3
import pytest

from data_prep.store import open_store
from tests.s3 import FaultProxy, s3_server


@pytest.fixture(scope="session")
def s3_url():
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(s3_url, monkeypatch):
    """The environment of a process that may use the server; yields the URI of an empty store."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("S3_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "10")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_url).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def proxy(s3, s3_url, monkeypatch):
    """A fault proxy that the store goes through; faults are appended to its `faults`."""
    proxy = FaultProxy(s3_url)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture(params=["local", "s3"])
def store_uri(request, tmp_path, monkeypatch):
    """The address of an empty store, once of each kind."""
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "10")
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def store(store_uri):
    store = open_store(store_uri, create=True)
    yield store
    store.close()
