"""The benchmark of elastic networks runs, and ends with one line of JSON."""

import json

from benchmarks import elastic


def test_it_runs(capsys):
    elastic.main(["--tiny"])
    lines = capsys.readouterr().out.splitlines()
    values = json.loads(lines[-1])
    assert set(values["attention"]) == {"256", "1024"}
    assert set(values["excess"]) == {f"depth{depth}_patch{patch}" for depth in (4, 2) for patch in (2, 4)}
    assert sum(line.startswith("| depth") for line in lines) == 4
