"""Tables are read by the calling thread alone.

A thread of pyarrow's own that lets go of bytes of Python while the interpreter exits ends the process with
`terminate called without an active exception`: one command in five did on a busy machine.
"""

import subprocess
import sys

import pytest

THREADS = """
import io, os, sys
import pyarrow as pa, pyarrow.parquet as pq
from data_prep.dataset.records import count_groups, parse_table
from data_prep.sources.folder import READERS

def count():
    return len(os.listdir("/proc/self/task"))

sink = io.BytesIO()
pq.write_table(pa.table({"file_name": ["a", "b"], "text": ["one", "two"]}), sink, row_group_size=1)
data = sink.getvalue()
before = count()
assert parse_table(data).num_rows == 2 and parse_table(data, columns=["text"], group=1).num_rows == 1
assert count_groups(data, None) == 2 and len(list(READERS["metadata.parquet"](data))) == 2
print(count() - before)
if sys.argv[1:]:
    pq.ParquetFile(io.BytesIO(data)).read()
    print(count() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_reads_a_table_of_bytes():
    def started(*arguments):
        program = [sys.executable, "-c", THREADS, *arguments]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()

    assert started() == ["0"]
    ours, by_default = started("default")
    assert ours == "0"
    assert int(by_default) > 0, "pyarrow starts no threads any more"
