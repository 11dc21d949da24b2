"""`python -m tests.helpers.gpu_probe_phases OUT`: the probe with phases that fail in every way."""

import os
import signal
import sys
import time

import torch

from benchmarks import gpu_probe
from benchmarks.gpu_probe import Phase


def raises(probe):
    probe.result("before", 1.0, "ms", at_least=0.5)
    raise ValueError("a wrong size\nand a second line")


def breaks_in_parts(probe):
    with probe.part("one"):
        raise RuntimeError("no kernel")
    with probe.part("other", optional=True):
        raise RuntimeError("no such kernel")
    probe.result("after", 2.0, "ms")


def lacks_a_package(probe):
    import package_that_nobody_has  # noqa: F401 # pyright: ignore[reportMissingImports]


def is_late(probe):
    probe.result("before", 1.0, "ms")
    time.sleep(0.2)
    probe.milliseconds(lambda: torch.ones(2))
    probe.result("after", 1.0, "ms")


def dies(probe):
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(probe):
    raise SystemExit("enough")


def never_ends(probe):
    while True:
        time.sleep(0.1)


def works(probe):
    probe.result("size", probe.pick(1000, 1), "rows", at_most=10)


if __name__ == "__main__":
    gpu_probe.GRACE_SECONDS = 1.0
    runs = (raises, breaks_in_parts, lacks_a_package, is_late, dies, exits, never_ends, works)
    gpu_probe.PHASES = [Phase(run.__name__, 0.1 if run in (is_late, never_ends) else 30, run) for run in runs]
    sys.exit(gpu_probe.main(["--tiny", "--out", sys.argv[1]]))
