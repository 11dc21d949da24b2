"""A snapshot that the tests of trainings only read."""

import pytest

from tests.helpers import fake_snapshot


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    return str(fake_snapshot.make_local(tmp_path_factory.mktemp("store"), fake_snapshot.TWO_BUCKETS))
