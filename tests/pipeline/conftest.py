"""Fixtures of the tests that read a snapshot: a local store with the module's BUCKETS, and a cache."""

import pytest

from tests.pipeline import fake_snapshot as fake


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    return fake.make_local(tmp_path_factory.mktemp("snapshot"), request.module.BUCKETS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
