"""Fixtures of the tests that read a snapshot: a local store with the module's BUCKETS, and a cache."""

import os

import pytest

from tests.helpers import fake_snapshot as fake


@pytest.fixture(scope="module")
def store(request, tmp_path_factory):
    return fake.make_local(tmp_path_factory.mktemp("snapshot"), request.module.BUCKETS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stage(store, cache):
    return fake.stage(store, cache)


@pytest.fixture
def wrong_store(tmp_path, monkeypatch):
    """Makes a store whose texts hold `rows` of 6 rows, and one of them other ids; its commits do not say
    so."""
    text_row, write = fake.text_row, fake.write_mds

    def make(rows):
        monkeypatch.setattr(
            fake,
            "write_mds",
            lambda path, columns, all: write(
                path, columns, all if columns == fake.LATENTS.columns else all[:rows]
            ),
        )
        monkeypatch.setattr(
            fake, "text_row", lambda id, family: {**text_row(id, family), "id": id + (family == "wide")}
        )
        fake.make(tmp_path / "store", {"64x64": [6]}, tmp_path)
        return tmp_path / "store"

    return make


@pytest.fixture
def store_of_another(tmp_path, monkeypatch):
    """A local store whose files' times may not be set."""
    store, set_times = fake.make_local(tmp_path, {"64x64": [9]}), os.utime

    def utime(path, *arguments, **times):
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if name.startswith(str(store)):
            raise PermissionError(name)
        set_times(path, *arguments, **times)

    monkeypatch.setattr(os, "utime", utime)
    return store
