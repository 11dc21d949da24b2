"""The probe of a GPU in tiny sizes on the CPU: every phase gives results, and none ends another."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import gpu_probe

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    """Run a module to its end, on one thread."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def read(out):
    """Lines of the results by phase."""
    phases = defaultdict(list)
    for line in (out / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        phases[result["phase"]].append(result)
    return phases


@pytest.mark.slow
def test_every_phase_gives_results_or_says_why_not(tmp_path):
    done = run("benchmarks.gpu_probe", "--tiny", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    phases = read(tmp_path)
    assert list(phases) == [phase.name for phase in gpu_probe.PHASES]

    for name, lines in phases.items():
        assert lines[-1]["what"] == "time of the phase"
        assert len(lines) > 1, name
        for line in lines:
            assert ("value" in line) != ("skipped" in line), line
            assert "value" not in line or isinstance(line["value"], float), line

    last = json.loads(done.stdout.splitlines()[-1])
    assert last["failed"] == []
    assert len(last["goals"]) == 4
    assert all(goal["met"] for goal in last["goals"].values())
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 1 + sum(map(len, phases.values()))


def test_a_failed_phase_is_a_line_and_ends_no_other(tmp_path):
    done = run("tests.helpers.gpu_probe_phases", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    phases = read(tmp_path)

    before, error, _ = phases["raises"]
    assert (before["value"], error["error"]) == (1.0, "ValueError: a wrong size")
    part, other, after, _ = phases["breaks_in_parts"]
    assert part["error"] == "RuntimeError: no kernel"
    assert other["skipped"] == "RuntimeError: no such kernel"
    assert after["value"] == 2.0
    assert phases["lacks_a_package"][0]["skipped"] == "the package package_that_nobody_has is not installed"

    assert [line["what"] for line in phases["is_late"]] == ["before", "the rest", "time of the phase"]
    assert phases["is_late"][1]["skipped"] == "the 0 s of this phase are over"
    assert phases["dies"][0]["error"] == "the process was ended by SIGSEGV"
    assert phases["exits"][0]["error"] == "the process ended with the code 1"
    assert phases["never_ends"][0]["error"].startswith(
        "the process did not end within 1 s after its deadline"
    )
    assert phases["works"][0]["value"] == 1.0

    last = json.loads(done.stdout.splitlines()[-1])
    assert last["failed"] == ["breaks_in_parts", "dies", "exits", "never_ends", "raises"]
    assert [goal["met"] for goal in last["goals"].values()] == [True, True]
    assert "| raises | all | **failed**: ValueError: a wrong size |" in done.stdout


def test_phases_after_the_end_are_skipped(tmp_path):
    assert gpu_probe.run_all(gpu_probe.PHASES, tmp_path, minutes=0, tiny=True)
    lines = [line for (line,) in read(tmp_path).values()]
    assert [line["phase"] for line in lines] == [phase.name for phase in gpu_probe.PHASES]
    assert {line["skipped"] for line in lines} == {"the 0 minutes of the probe are over"}


def test_phases_fit_into_their_minutes_and_are_chosen_by_name(tmp_path, capsys):
    assert sum(phase.seconds for phase in gpu_probe.PHASES) <= 9 * 60
    options = gpu_probe.parse(["--tiny", "--out", str(tmp_path), "--only", "parity,machine"])
    assert [phase.name for phase in options.phases] == ["machine", "parity"]
    with pytest.raises(SystemExit):
        gpu_probe.parse(["--tiny", "--out", str(tmp_path), "--only", "parity,speed"])
    assert "--only speed: no such phase" in capsys.readouterr().err
