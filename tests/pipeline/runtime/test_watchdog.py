"""One rank that fails or hangs ends all, and every log says which and why."""

import os
import re
import signal
import time

import pytest

from pipeline.operations.first_error import find_first_error
from pipeline.stage.config import dump_stage
from tests.helpers import watchdog_tasks as tasks
from tests.helpers.distributed import Pool
from tests.helpers.small_network import stage


@pytest.fixture
def pool():
    pool = Pool(2)
    yield pool
    for process in pool.processes:
        process.kill()  # also where it was stopped
    pool.kill()


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(pool, folder, ranks=(0, 1)):
    """Exit codes and logs of ranks that end by themselves."""
    for rank in ranks:
        pool.processes[rank].join(60)
    return [pool.processes[rank].exitcode for rank in ranks], [
        (folder / f"rank_{rank:05d}.txt").read_text() for rank in ranks
    ]


def test_an_exception_on_one_rank_ends_the_other_and_its_trace_is_the_first_error(pool, tmp_path):
    pool.send(tasks.watched, (str(tmp_path), "raise", 1, 100))
    codes, (other, failed) = end(pool, tmp_path)
    assert codes == [1, 1]
    assert re.fullmatch(r"rank 1 of 2 failed:\nTraceback (?s:.*)\nRuntimeError: on purpose\n\n", failed)
    assert other == "rank 0 ends: rank 1 failed: RuntimeError: on purpose\n"
    assert find_first_error(tmp_path, {}).startswith("rank_00001: Traceback")


@pytest.mark.parametrize("who", [0, 1])
def test_a_users_error_on_one_rank_is_one_line_and_everyones_exit_code(pool, tmp_path, who):
    pool.send(tasks.watched, (str(tmp_path), "user error", who, 100))
    codes, logs = end(pool, tmp_path)
    assert codes == [2, 2]
    assert logs[who] == "error: this and that: change them\n"
    assert logs[1 - who].startswith(f"rank {1 - who} ends: rank {who} failed: ")


def test_a_rank_that_is_stuck_is_named_with_its_phase_by_all(pool, tmp_path):
    pool.send(tasks.watched, (str(tmp_path), "sleep", 1, 1))
    codes, logs = end(pool, tmp_path)
    assert codes == [1, 1]
    hangs = (
        rf"rank 1 \(\S+, process {pool.processes[1].pid}\) in phase `data` of step 3 hangs: "
        r"no rank has made progress for .* s\n"
    )
    assert all(re.fullmatch(rf"(error|rank \d ends): {hangs}", log) for log in logs)
    assert any(log.startswith("error: ") for log in logs)


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_stopped_is_named_with_its_phase(pool, tmp_path, who):
    pool.send(tasks.watched, (str(tmp_path), "wait to be stopped", who, 1000))
    wait_for(tmp_path / "here")
    time.sleep(1.5)  # for its phase to be told
    os.kill(pool.processes[who].pid, signal.SIGSTOP)
    codes, (log,) = end(pool, tmp_path, [1 - who])
    assert codes == [1]
    hangs = rf"rank {who} \(\S+, process \d+\) in phase `data` of step 3 hangs: no heartbeat for \d+ s"
    assert re.fullmatch(rf"error: {hangs}, (the others wait|this rank waits) in step 3\n", log)


def test_the_training_command_ends_all_ranks_when_one_fails(pool, tmp_path):
    config = stage()
    config.runs = str(tmp_path / "runs")
    (tmp_path / "stage.yaml").write_text(dump_stage(config))
    pool.send(tasks.command, (str(tmp_path), str(tmp_path / "stage.yaml")))
    codes, (other, failed) = end(pool, tmp_path)
    assert codes == [1, 1]
    assert "RuntimeError: on purpose" in failed
    assert other.startswith("rank 0 ends: rank 1 failed: RuntimeError: on purpose")


def test_a_killed_rank_0_is_named(pool, tmp_path):
    pool.send(tasks.watched, (str(tmp_path), "wait to be stopped", 0, 1000))
    wait_for(tmp_path / "here")
    pool.processes[0].kill()
    codes, (log,) = end(pool, tmp_path, [1])
    assert codes == [1]
    # also where the collective breaks before the watching thread sees it
    assert re.search(r"^rank 1 ends: rank 0 .*has exited without an error message$", log, re.MULTILINE)
