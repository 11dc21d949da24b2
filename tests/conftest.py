"""Fixtures of several packages: an S3 API on loopback, with and without faults, and stores of both kinds."""

import logging
import resource
import signal
import uuid
from contextlib import contextmanager

import boto3
import pytest
from botocore.loaders import create_loader

from data_prep.store.store import open_store
from tests.helpers.s3 import BUCKET, CREDENTIALS, FaultProxy, s3_server


@pytest.fixture(scope="session", autouse=True)
def one_loader():
    """Read botocore's files on AWS's services once: for each client it takes a tenth of a second."""
    loader = create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", lambda path=None: loader)
        yield


@pytest.fixture(scope="session")
def s3_url():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as url:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
        yield url


@pytest.fixture
def s3(s3_url, monkeypatch):
    """Set the environment of a process that uses the server, and return the URI of an empty store."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S3_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "10")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/prefix"


@pytest.fixture
def proxy(s3, s3_url, monkeypatch):
    """Put a fault proxy in front of the store; tests set its `faults`."""
    proxy = FaultProxy(s3_url)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def full_disk():
    """Return a context manager that limits the size of files, which looks like a full disk to a program."""

    @contextmanager
    def limited(size):
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    return limited


@pytest.fixture(params=["local", "s3"])
def store_uri(request, tmp_path, monkeypatch):
    """Return the address of an empty store, once for each kind."""
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "2")
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def store(store_uri):
    store = open_store(store_uri, create=True)
    yield store
    store.close()
