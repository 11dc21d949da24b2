"""Limits of a machine and what strangers leave in a run's folder: one line, exit code 2."""

import errno
import os

import pytest
import xxhash

from data_prep.store.store import StoredFile, open_store
from model.common.errors import UserError, command, explain
from pipeline.data.shard_cache import ShardCache
from pipeline.runtime.stopping import refuse_stop_file


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/x"), "too many open files"),
        (RuntimeError("received 0 items of ancdata: Too many open files"), "too many open files"),
        (RuntimeError("unable to open shared memory object </torch_7> in read-write mode"), "/dev/shm"),
        (RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"), "/dev/shm"),
        (RuntimeError("DataLoader worker is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "/dev/shm"),
        (OSError(errno.EROFS, "Read-only file system"), "/dev/shm"),
    ],
)  # fmt: skip
def test_limits_of_the_machine_are_one_line(capsys, error, says):
    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith("error: ")
    assert says in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("out of resource: shared memory, Required: 114688"),
        OSError(errno.EROFS, "Read-only file system", "/runs/x"),
        ValueError("a fault"),
    ],
)
def test_other_errors_keep_their_trace(error):
    assert explain(error) is error

    @command
    def main():
        raise error

    with pytest.raises(type(error)):
        main()


def test_a_full_disk_of_the_cache_names_the_cache_and_not_the_store(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"), create=True)
    store.put("latents/00000.mds", b"rows")
    file = StoredFile("latents/00000.mds", 4, xxhash.xxh64_hexdigest(b"rows"))
    cache = ShardCache(store, tmp_path / "cache", "abc", None)
    assert cache.is_local

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardCache, "locked", full)
    with pytest.raises(UserError, match=f"{cache.folder}: No space left on device"):
        cache.get(file, "latents/00000", 1.0)


def test_a_stop_file_that_was_left_says_so_before_a_start(tmp_path):
    refuse_stop_file(tmp_path)
    (tmp_path / "stop").touch()
    with pytest.raises(UserError, match="stop asks this run to stop: remove the file to continue"):
        refuse_stop_file(tmp_path)
