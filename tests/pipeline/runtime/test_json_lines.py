"""Files of one record per line hold only whole lines, whatever ended the writer before."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.runtime import json_lines
from pipeline.runtime.json_lines import append_line
from pipeline.runtime.run_log import read_lines

RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)), max_size=4)

LAST = {"event": "end", "time": 1.0}


@given(before=RECORDS, torn=st.binary(max_size=200), block=st.integers(1, 300))
def test_a_torn_last_line_is_cut_off_and_no_whole_one_is_lost(tmp_path_factory, before, torn, block):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    for record in before:
        append_line(path, record)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    with pytest.MonkeyPatch.context() as patch:
        # a torn line may be longer than what is read at once
        patch.setattr(json_lines, "_BLOCK", block)
        append_line(path, LAST)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*before, LAST]
    assert list(read_lines(path.parent))[-1] == LAST


@given(room=st.integers(0, 40), step=st.integers(1, 40))
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_it_as_it_was(tmp_path_factory, room, step):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    append_line(path, {"step": 0})
    before, left, real = path.read_bytes(), room, os.write

    def write(descriptor, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # as on a disk that is nearly full
        written = real(descriptor, data[: min(left, step)])
        left -= written
        return written

    record = {"event": "start", "detail": "x" * 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines.os, "write", write)
        with pytest.raises(UserError, match=f"{path}: No space left on device: free space there"):
            append_line(path, record)
    assert path.read_bytes() == before
    append_line(path, record)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [{"step": 0}, record]
