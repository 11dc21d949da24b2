"""Files: the one atomic write, the error of a full disk, and the cache folder of this user."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.common.errors import UserError

UNFINISHED = ".part"
"""Suffix of temporary files, so that a cleanup can find what a killed process left behind."""


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` if the block ends without an error.

    Readers see the old file, or the whole new one, never a part of it. The temporary name, `NAME.RANDOM.part`
    in the same folder, is unique, so several processes may write one file: the last one wins. After an error
    nothing is left of it. The block may make a file or a folder; a folder replaces only what does not exist
    or is an empty folder.

    A full disk is an `OSError` here: put `naming_full_disk` around it where a user should read the path.

    Args:
        path: the final name; its folder has to exist.
        durable: force the file, and then its name, to disk, so that both survive a power cut. For files only.
    """
    # In the same folder, since only within one file system a rename is atomic.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield temporary
        # Content first: a name that survives a power cut before its content would be an empty file.
        if durable:
            sync_path(temporary)
        os.replace(temporary, path)
    # Ctrl-C, too, should leave nothing.
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def write_atomic(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Write a small file at once, as `atomic_path` does; text as UTF-8."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full_disk(error: OSError) -> bool:
    """True if the disk, the quota or the permitted file size is used up."""
    # EFBIG: `ulimit -f`, which some clusters set.
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into an error that names `path`.

    Raises:
        UserError: if the disk, the quota or the permitted file size is used up.
    """
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise UserError(
                f"{path}: {error.strerror}: free space there, or use another disk, and run again"
            ) from error
        raise


def cache_folder() -> Path:
    """Return this program's cache folder, `$XDG_CACHE_HOME/li-dit`; it may not exist yet."""
    # By the XDG specification an empty variable counts as unset.
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "li-dit"
