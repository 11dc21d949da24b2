"""One start of a run at a time: the lock names its holder, and nothing has to be removed after a kill."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from model.common.errors import UserError
from pipeline.runtime.run_lock import lock_run

HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.runtime.run_lock import lock_run
lock_run(Path(sys.argv[1]))
child = os.fork()  # as a loader process does
print(child or os.getpid(), flush=True) if child else None
time.sleep(60)
"""


@contextmanager
def holder(run, attempt=""):
    """A process that holds the lock, with a child of its own."""
    environment = {**os.environ, "LI_DIT_ATTEMPT": attempt}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        os.kill(child, 9)


def test_a_second_start_is_refused_and_a_killed_one_leaves_the_run_free(tmp_path, monkeypatch):
    monkeypatch.delenv("LI_DIT_ATTEMPT", raising=False)
    with holder(tmp_path / "run") as process:
        with pytest.raises(UserError, match=f"being trained by process {process.pid} on .*: stop that one"):
            lock_run(tmp_path / "run")
        process.kill()
        process.wait()
        # although a process that it had started still runs
        lock_run(tmp_path / "run")
        assert f"process {os.getpid()} on" in (tmp_path / "run/lock").read_text()


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        ("", "7.1", True),
        ("7.1", "7.1", True),
        ("7.1", "", True),
        ("7.1", "7.2", False),
        ("7.1", "71.0", False),
    ],
)
def test_only_a_newer_attempt_of_a_job_goes_on_beside_what_is_left_of_an_older_one(
    tmp_path, monkeypatch, theirs, ours, refused
):
    monkeypatch.setenv("LI_DIT_ATTEMPT", ours)
    with holder(tmp_path, theirs):
        if refused:
            with pytest.raises(UserError, match=f"job {theirs}, process" if theirs else "by process"):
                lock_run(tmp_path)
            return
        lock_run(tmp_path)
        # the new file is locked: a third start sees the new holder
        with pytest.raises(subprocess.CalledProcessError) as third:
            subprocess.run(
                [sys.executable, "-c", HOLDER, str(tmp_path)],
                check=True, capture_output=True, text=True, env={**os.environ, "LI_DIT_ATTEMPT": ""},
            )  # fmt: skip
        assert f"by job {ours}, process {os.getpid()} on" in third.value.stderr


def test_a_file_system_without_locks_is_told_and_trained_on(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock_run(tmp_path)
    assert "has no locks: do not start a run twice" in caplog.text
