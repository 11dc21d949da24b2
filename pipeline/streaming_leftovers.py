"""What a job on mosaicml-streaming leaves behind when it is killed: found, and removed once the job is dead.

Streaming keeps its state in shared memory (`/dev/shm/000029_locals` and eight more), which outlives a kill and can refuse the
next start. `_locals` names the job's folders, and there a lock tells whether the job lives: its processes hold it, the kernel
lets it go with the last of them. So no life is guessed from process ids, which differ between containers that share the memory.
"""

import atexit
import fcntl
import os
import shutil
import socket
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch.distributed as dist

SHARED_MEMORY = Path("/dev/shm")
_ALIVE = "alive"


class JobFolder:
    """A folder of this job on this machine, under a cache directory. It goes with the last of the job's processes here, or, if
    they are killed, when the next job starts on the cache."""

    def __init__(self, root: Path) -> None:
        """Make or join it, and remove what dead jobs have left.

        Args:
            root: the cache directory.
        """
        self._jobs = root / "streaming" / socket.gethostname()
        self.path = self._jobs / _agreed_name()
        atexit.register(self._leave)  # before streaming registers its own, so it runs after them
        self._alive: IO[str] | None = _enter(self.path)
        remove_leftovers(self._jobs)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_alive": None}

    def _leave(self) -> None:
        if self._alive is not None:
            self._alive.close()
            remove_leftovers(self._jobs)


def _agreed_name() -> str:
    """The same on all ranks, and no other job's."""
    name = [uuid.uuid4().hex]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    return name[0]


def _enter(folder: Path) -> IO[str]:
    """Join a job: hold its lock with the other processes."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file = (folder / _ALIVE).open("a")
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_still(folder / _ALIVE, file):
                return file
            file.close()  # taken for a dead job's before the lock was held


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether `path` is the file that was opened, and not removed since."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _lock_of_the_dead(folder: Path) -> IO[str] | None:
    """The lock of a job of which no process lives, held: so none can join it."""
    with suppress(BlockingIOError, FileNotFoundError, PermissionError):  # it lives, is removed already, or is another user's
        file = (folder / _ALIVE).open("r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(folder / _ALIVE, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    return None


def remove_leftovers(jobs: Path) -> list[Path]:
    """Remove the folders of dead jobs and the shared memory that belongs to them; never a living job's, nor what is not ours.

    Args:
        jobs: the folder of all jobs' folders.

    Returns:
        What was removed.
    """
    removed = []
    for folder in sorted(jobs.glob("*")):
        lock = _lock_of_the_dead(folder)
        if lock is not None:
            with lock:
                removed += _remove_shared_memory(folder)
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _remove_shared_memory(folder: Path) -> list[Path]:
    removed = []
    for names in SHARED_MEMORY.glob("[0-9]*_locals"):
        with suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            if f"{folder}/".encode() not in names.read_bytes():
                continue
            prefix = names.name.removesuffix("locals")
            # `_locals` last: as long as it is there, streaming gives its number to no other job.
            for path in [*(path for path in SHARED_MEMORY.glob(f"{prefix}*") if path != names), names]:
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed
