"""What a job decides about itself, without Slurm: properties of the rules."""

import errno
import itertools
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.common.errors import UserError
from pipeline.operations.attempts import (
    MAX_BAD_NODES,
    MAX_CRASHES,
    begin,
    cause_of_end,
    end,
    exit_code,
    needs_gpu,
    progress,
    read_endings,
)
from pipeline.operations.first_error import find_first_error
from pipeline.operations.preflight import NodeReport, decide
from pipeline.runtime.attempt import Attempt
from pipeline.runtime.run_log import elapsed_seconds, goodput
from pipeline.stage.config import STAGES, StageConfig, load_stage
from pipeline.status import duration, read_status


@pytest.fixture
def stage(tmp_path):
    return StageConfig(name="one", runs=str(tmp_path))


def attempt(restart=0, job="7"):
    return Attempt(job, restart, "n1", time.time())


def report_step(run, step):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "samples": 8 * step, "time": time.time()}) + "\n")


RUNNING = "JobId=7 JobState=RUNNING Restarts=0 RunTime=00:10:00 TimeLimit=01:00:00"


def crash(stage, restart, rc=1):
    run = begin(stage, attempt(restart), gpus=0)
    return end(run, rc, RUNNING.replace("Restarts=0", f"Restarts={restart}"), "", "")


def test_third_crash_at_one_step_ends_the_run_and_progress_forgives(stage):
    run = stage.run
    run.mkdir(parents=True)
    report_step(run, 10)
    codes = [crash(stage, restart) for restart in range(2)]
    report_step(run, 20)
    codes += [crash(stage, restart) for restart in range(2, 5)]
    assert codes == [85, 85, 85, 85, 1]
    assert MAX_CRASHES == 3


def test_bad_nodes_do_not_count_as_crashes_and_end_too(stage):
    codes = []
    for restart in range(MAX_BAD_NODES):
        run = begin(stage, attempt(restart), gpus=0)
        codes.append(end(run, 1, RUNNING.replace("Restarts=0", f"Restarts={restart}"), "", f"n{restart}"))
    assert codes == [85] * (MAX_BAD_NODES - 1) + [1]
    assert crash(stage, MAX_BAD_NODES) == 85


@pytest.mark.parametrize(("rc", "code"), [(0, 0), (2, 2), (85, 85), (1, 85), (137, 85)])
@pytest.mark.parametrize("state", ["CANCELLED", "RUNNING"])
def test_cancelled_job_is_never_queued_again(stage, rc, code, state):
    run = begin(stage, attempt(), gpus=0)
    done = end(run, rc, RUNNING.replace("RUNNING", "COMPLETING" if state == "CANCELLED" else state), "", "")
    assert done == (code if state == "RUNNING" else 0)


@pytest.mark.parametrize(
    ("job", "who"),
    [
        (RUNNING, "itself"),
        ("JobState=COMPLETING Restarts=0 RunTime=00:10:00 TimeLimit=1-00:00:00", "user"),
        ("JobState=COMPLETING Restarts=0 RunTime=1-00:00:03 TimeLimit=1-00:00:00", "time"),
        ("JobState=COMPLETING Restarts=0 RunTime=10:00:00 TimeLimit=UNLIMITED", "user"),
        ("JobState=COMPLETING Restarts=1 RunTime=00:00:00 TimeLimit=00:10:00", "outside"),
    ],
)
def test_who_ended_a_job(job, who):
    assert cause_of_end(job, 0) == who


def test_job_that_vanished_is_written_down_by_the_next(stage):
    run = begin(stage, attempt(0), gpus=0)
    begin(stage, attempt(1), gpus=0)
    assert [(one.kind, one.restart, one.requeued) for one in read_endings(run)] == [("lost", 0, True)]


@pytest.mark.parametrize("content", [b"", b'{"job": "7"', b"\0" * 50, b"[]", b"[" * 100_000, b'{"job": 3}'])
def test_damaged_records_of_earlier_attempts_keep_no_run_from_starting_again(stage, content, caplog):
    crash(stage, 0)
    (stage.run / "attempt.json").write_bytes(content)
    with (stage.run / "attempts.jsonl").open("ab") as file:
        file.write(content)
    run = begin(stage, attempt(1), gpus=0)
    assert [(one.kind, one.restart) for one in read_endings(run)] == [("crash", 0)]
    assert "passed over" in caplog.text
    assert end(run, 1, RUNNING.replace("Restarts=0", "Restarts=1"), "", "") == 85
    assert [one.restart for one in read_endings(run)] == [0, 1]
    assert read_status(run, time.time()).state


def fake_sinfo(folder, monkeypatch, states):
    script = folder / "bin" / "sinfo"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nprintf '{states}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")


def test_endings_name_the_node_that_died(stage, tmp_path, monkeypatch, capsys):
    fake_sinfo(tmp_path, monkeypatch, "n1 idle\nn2 down*\nn3 mixed*\nn4 failing\n")
    run = begin(stage, attempt(0), gpus=0)
    begin(stage, attempt(1), gpus=0)
    assert read_endings(run)[-1].reason == "the job ended without a record, and n2, n3, n4 is down"
    report_step(run, 10)
    assert crash(stage, 2) == 85
    assert read_endings(run)[-1].reason == "crashed with exit code 1; n2, n3, n4 is down"
    begin(stage, attempt(3), gpus=0)
    end(run, 1, "JobState=COMPLETING Restarts=4 RunTime=00:00:00 TimeLimit=00:10:00", "", "")
    assert read_endings(run)[-1].reason == "requeued from outside; n2, n3, n4 is down"
    assert "n2, n3, n4 is down" in capsys.readouterr().out


def test_a_full_disk_hides_no_ending(stage, monkeypatch, capsys):
    run = begin(stage, attempt(0), gpus=0)
    (run / "logs/rank_00000.txt").write_text("error: no more of this\n")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"attempts\.jsonl: No space left on device: free space"):
            end(run, 2, RUNNING, "", "")
        with pytest.raises(UserError, match="No space left on device: free space"):
            begin(stage, attempt(1), gpus=0)
    assert "first error: rank_00000: error: no more of this" in capsys.readouterr().out
    # once there is space again, the next start works
    begin(stage, attempt(2), gpus=0)
    assert "its disk was full" in read_endings(run)[-1].reason


JUMPS = st.lists(st.sampled_from([1.0, 5.0, -3e7, 3e7, 0.0, -1.0]), min_size=1, max_size=20)


@given(jumps=JUMPS, step_seconds=st.floats(0, 1e3))
def test_goodput_is_a_share_of_time_whatever_the_clock_does(jumps, step_seconds):
    times = itertools.accumulate(jumps, initial=1.7e9)
    elapsed = elapsed_seconds({"time": time} for time in times)
    assert elapsed == pytest.approx(sum(jump for jump in jumps if jump > 0), abs=1e-3)
    assert 0 <= goodput(step_seconds, elapsed) <= 1
    steady = [{"time": 1.7e9 + second} for second in range(10)]
    assert elapsed_seconds(steady) == 9
    assert elapsed_seconds(steady, 1.7e9 + 20) == 20
    assert elapsed_seconds([], 1.7e9) == 0


def test_ranks_exit_codes_beat_the_codes_of_those_that_srun_killed(stage):
    run = begin(stage, attempt(), gpus=0)
    log = run / "logs/srun.txt"
    for own, rc in ((85, 85), (2, 2), (1, 137)):
        log.write_text(
            f"srun: error: n2: tasks 1-3: Exited with exit code {own}\nsrun: error: n1: task 0: Killed\n"
        )
        assert exit_code(run, 137, attempt()) == rc
    log.write_text("srun: error: n1: task 0: User defined signal 1\n")
    assert exit_code(run, 138, attempt()) == 85


def test_progress_is_the_last_report_or_a_later_checkpoint(stage):
    run = begin(stage, attempt(), gpus=0)
    assert progress(run) == 0
    for step in (10, 20, 30, 20):  # went back to a checkpoint
        report_step(run, step)
    assert progress(run) == 20
    (run / "checkpoints/step_000000025").mkdir(parents=True)
    assert progress(run) == 20
    (run / "checkpoints/step_000000025/manifest.json").touch()
    assert progress(run) == 25


def test_refusals(stage):
    with pytest.raises(UserError, match="needs GPUs"):
        begin(load_stage("li_dit_1b_256", [f"runs={stage.runs}"]), attempt(), gpus=0)
    (stage.run).mkdir(parents=True)
    (stage.run / "stop").touch()
    with pytest.raises(UserError, match="remove the file"):
        begin(stage, attempt(), gpus=0)


def test_only_the_demo_runs_without_gpus():
    small = {path.stem for path in STAGES.glob("*.yaml") if not needs_gpu(load_stage(path.stem, []))}
    assert "demo" in small
    assert not [name for name in small if name.startswith("li_dit")]


def test_first_error_is_the_cause_not_the_echo(tmp_path):
    echo = (
        "Traceback (most recent call last):\n  File a\n"
        "RuntimeError: [gloo/transport/tcp] Connection closed by peer [n2]\n"
    )
    cause = (
        "Traceback (most recent call last):\n  File b\n    x = 1 / 0\nZeroDivisionError: division by zero\n"
    )
    (tmp_path / "rank_00000.txt").write_text("old Error: of an earlier start\n" + echo)
    (tmp_path / "rank_00003.txt").write_text("step 1\n" + cause)
    (tmp_path / "srun.txt").write_text("srun: error: n1: task 0: Killed\n")
    assert find_first_error(tmp_path, {}) == "rank_00003: " + cause.strip()
    (tmp_path / "rank_00003.txt").write_text("step 1\n")
    assert find_first_error(tmp_path, {}) == "srun: n1: task 0: Killed"
    (tmp_path / "srun.txt").unlink()
    assert "Connection closed" in find_first_error(tmp_path, {})
    assert find_first_error(tmp_path, {"rank_00000.txt": 10_000}) == ""


def fit(node, rank=0, **changes):
    return NodeReport(
        **{"node": node, "rank": rank, "local_rank": 0, "versions": {"torch": "2"}, "clock": 100.0, **changes}
    )


NODES = st.lists(st.sampled_from([f"n{i}" for i in range(8)]), min_size=3, max_size=8, unique=True)


@given(NODES, st.sampled_from(["versions", "clock", "gpu", "missing", "slow"]))
def test_one_odd_node_is_named_and_no_other(nodes, fault):
    odd, *others = nodes
    changes = {
        "versions": {"versions": {"torch": "1"}},
        "clock": {"clock": 200.0},
        "gpu": {"errors": [("gpu", "GPU 3: a matrix product is wrong")], "clock": None},
        "slow": {"node_bandwidth": 1.0},
        "missing": {},
    }[fault]
    reports = [fit(node, gpus=8, node_bandwidth=100.0) for node in others]
    if fault != "missing":
        reports.append(fit(odd, **{"gpus": 8, "node_bandwidth": 100.0, **changes}))
    verdict = decide(reports, nodes)
    assert set(verdict.bad) == {odd}
    assert not verdict.everywhere


@given(NODES, st.sampled_from(["store", "run", "shm", "cache"]))
def test_what_all_nodes_have_alike_is_no_nodes_fault(nodes, topic):
    verdict = decide([fit(node, errors=[(topic, "is missing")], clock=None) for node in nodes], nodes)
    assert verdict.everywhere == "is missing"
    assert not verdict.bad


@given(NODES)
def test_fit_nodes_pass_and_a_broken_network_blames_none(nodes):
    verdict = decide([fit(node) for node in nodes], nodes)
    assert (verdict.bad, verdict.everywhere, verdict.network) == ({}, "", "")
    verdict = decide([fit(node, errors=[("network", "timed out")], clock=None) for node in nodes], nodes)
    assert verdict.network
    assert (verdict.bad, verdict.everywhere) == ({}, "")


def test_status_counts_steps_once_and_foretells_the_end(stage):
    run = begin(stage, attempt(), gpus=0)
    (run / "stage.yaml").write_text("samples: 3000\n")
    rows = [{"event": "start", "time": 0.0}]
    rows += [
        {"step": step, "samples": 10 * step, "time": step * 1.0, "loss": 1.0, "samples_per_second": 10.0}
        for step in range(1, 101)
    ]
    rows += [{"event": "start", "time": 150.0, "step": 50}]
    rows += [
        {"step": step, "samples": 10 * step, "time": 100.0 + step, "loss": 0.5, "samples_per_second": 10.0}
        for step in range(51, 151)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 15')
    status = read_status(run, now=1000.0)
    assert (status.step, status.samples, status.total, status.loss, status.starts) == (
        150,
        1500,
        3000,
        0.5,
        2,
    )
    assert status.goodput == pytest.approx(150 / 250)
    assert status.seconds_left == pytest.approx(150 / status.goodput)
    with pytest.raises(UserError, match="no such run"):
        read_status(run.parent / "none", 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8 s"), (720, "12 min"), (19_200, "5 h 20 min"), (273_600, "3 d 4 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
