"""Writing a file of one JSON record per line, so that a crash or a full disk leaves only whole lines."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.common.files import naming_full_disk

_BLOCK = 65536


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file, all of it or nothing.

    A last line that a killed process or a full disk cut short is removed first: the record would otherwise
    continue it, and no reader could separate the two.

    Raises:
        UserError: if the disk is full.
    """
    line = memoryview(json.dumps(record).encode() + b"\n")
    with naming_full_disk(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = _end_of_lines(descriptor)
            os.ftruncate(descriptor, end)
            try:
                # On a disk that is nearly full, a write may take only a part.
                while line:
                    line = line[os.write(descriptor, line) :]
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """Return the position after the last complete line."""
    end = os.fstat(descriptor).st_size
    # Of a file whose last line is complete, this reads one block; a torn line may be longer than that.
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
