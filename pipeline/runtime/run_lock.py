"""The lock of a run's folder: two starts of one run would write over each other's checkpoints and metrics."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from model.common.errors import UserError
from model.common.files import naming_full_disk
from pipeline.runtime.attempt import OWN_ATTEMPT

log = logging.getLogger(__name__)

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


_held: list[TextIO] = []
"""Files whose locks this process holds: closing a file would free its lock."""


def lock_run(run: Path) -> None:
    """Lock a run's folder until this process ends, however it ends.

    The kernel, or the file server, frees the lock of a process that has ended, so nothing has to be removed
    after `kill -9`. The file's text is only for people and for the error message.

    An attempt of a cluster job does not wait for the lock of an older attempt, which a dead node may hold on
    a file server for long: cluster/train.sh has checked that the older job has ended, and what is left of it
    commits no checkpoint (`check_newest_attempt`).

    Args:
        run: the run's folder.

    Raises:
        UserError: if another process holds the lock.
    """
    path = run / "lock"
    own = os.environ.get(OWN_ATTEMPT, "")
    with naming_full_disk(path):
        run.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+")
            try:
                # A lock of this process alone: one by `flock` would pass to the loader processes, which
                # outlive a killed rank for some seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    log.warning("%s: this file system has no locks: do not start a run twice", path)
                    return
                if error.errno not in _HELD:
                    raise
                _refuse(run, file, own)
                # A new file, since the old attempt's lock stays on the old one.
                path.unlink(missing_ok=True)
                continue
            if _is_still(path, file):
                break

        file.truncate(0)
        job = f"job {own}, " if own else ""
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"{job}process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        file.flush()
        _held.append(file)


def _refuse(run: Path, file: TextIO, own: str) -> None:
    """Raise unless the holder is an older attempt of a cluster job, and this process is a newer one."""
    file.seek(0)
    holder = file.read().strip() or "another process"
    if not (own and holder.startswith("job ") and not holder.startswith(f"job {own},")):
        raise UserError(f"{run} is being trained by {holder}: stop that one first, or give name=...")


def _is_still(path: Path, file: TextIO) -> bool:
    """True if the file was not replaced between its opening and its locking."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
