"""An atomic write leaves the whole new file, or the old one and nothing else, whatever happens meanwhile."""

import errno
import os
import stat
from multiprocessing import get_context

import pytest

from model.common.errors import UserError
from model.common.files import (
    UNFINISHED,
    atomic_path,
    cache_folder,
    naming_full_disk,
    sync_path,
    write_atomic,
)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path, durable):
    path = tmp_path / "file.json"
    path.write_text("old")
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("file.json.")
        assert temporary.name.endswith(UNFINISHED)
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


def write_half(path, error):
    with atomic_path(path, durable=True) as temporary:
        temporary.write_text("half")
        raise error


def write_half_a_folder(path):
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "first").touch()
        raise ValueError("half")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_alone(tmp_path, error):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_before_anything_was_written(tmp_path):
    with pytest.raises(ValueError, match="early"), atomic_path(tmp_path / "file"):
        raise ValueError("early")
    assert not os.listdir(tmp_path)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="half"):
        write_half_a_folder(tmp_path / "folder")
    assert not os.listdir(tmp_path)

    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "first").touch()
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["first"]

    # A folder with files is never replaced.
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path / "folder") == ["first"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_mode_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("durable", [False, True])
def test_a_full_disk_keeps_the_old_file(tmp_path, full_disk, durable):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with full_disk(1000):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_atomic(path, bytes(5000), durable=durable)
        with pytest.raises(UserError, match=f"{path}.*free space there"), naming_full_disk(path):
            write_atomic(path, bytes(5000), durable=durable)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), naming_full_disk(tmp_path):
        write_atomic(tmp_path / "missing" / "file", b"x")


def write_often(path, letter):
    for _ in range(50):
        write_atomic(path, letter * 10_000)


def test_writers_at_the_same_time_never_mix(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "x" * 10_000)
    context = get_context("spawn")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert len(text) == 10_000
        assert len(set(text)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


def test_a_durable_write_syncs_the_file_before_its_name_and_the_folder_after_it(tmp_path, monkeypatch):
    steps = []
    replace, fsync = os.replace, os.fsync

    def record_sync(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_name(source, target):
        steps.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_name)
    write_atomic(tmp_path / "file", "text", durable=True)
    assert steps == ["file", "name", "folder"]
    sync_path(tmp_path)
    assert steps[3:] == ["folder"]


def test_the_cache_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "li-dit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "li-dit"
