"""The benchmark of the host's work runs, and the regions and the step take fewer operations than before."""

from benchmarks import host
from tests.helpers.distributed import on_ranks


def run_small(folder):
    host.main(["--depth", "2", "--steps", "1", "--out", f"{folder}/host.md"])
    sides = {name: host.Side(2, before=name == "before") for name in ("before", "after")}
    return {name: side.count() for name, side in sides.items()}


def test_the_benchmark_counts_fewer_operations(tmp_path):
    counts = on_ranks(1, run_small, str(tmp_path))[0]
    for phase in host.PHASES:
        assert counts["after"][phase] < counts["before"][phase], phase
    table = (tmp_path / "host.md").read_text()
    assert [row.split(" | ")[0] for row in table.splitlines()[-3:]] == [f"| {phase}" for phase in host.PHASES]
