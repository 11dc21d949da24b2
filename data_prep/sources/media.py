"""Images and videos of source files: whole, or read in ranges if they are too large for memory."""

import functools

from data_prep.clips.large_file import MAX_VIDEO_BYTES, LargeFile, Media
from data_prep.sources.files import SourceFiles
from data_prep.sources.sample import TOO_LARGE, VIDEO_SUFFIXES, RefusedError

VIDEO_ENDINGS = tuple(f".{suffix}" for suffix in VIDEO_SUFFIXES)


def read_media(files: SourceFiles, name: str) -> Media:
    """Return an image or a video whole; a video that is too large for memory, as a file read in ranges.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        RefusedError: if it is not read.
    """
    try:
        return files.read(name)
    except RefusedError as error:
        if error.reason != TOO_LARGE or not name.lower().endswith(VIDEO_ENDINGS):
            raise

    return open_large(files, name, 0, files.size(name))


def open_large(files: SourceFiles, name: str, offset: int, length: int) -> LargeFile:
    """Return a range of a file as a file to be read in ranges, a video in a tar for one.

    Raises:
        RefusedError: if it is larger than any that is read.
    """
    if length > MAX_VIDEO_BYTES:
        raise RefusedError(TOO_LARGE, f"{name}: {length} bytes"[-200:])

    return LargeFile.of(functools.partial(files.open, name, buffer=0), length, offset)
