"""Memory of freed tensors serves the next ones."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
import torch
from pipeline.runtime.heap import keep_freed_memory

if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit(3)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory()
# An aligned tensor does not fit into the place of one that was freed, until two such places are one.
faults()
print(faults())
"""
PAGES = 20 * 64_000_000 // 4096
"""Of twenty tensors, in pages of 4 kB."""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
def test_pages_of_freed_tensors_are_used_again():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("kept") < PAGES // 100 < faults("returned")
