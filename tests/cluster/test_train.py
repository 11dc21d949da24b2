"""The life of a training job on a real Slurm: two nodes on this machine, a make-believe trainer."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def kinds(training):
    return [ending["kind"] for ending in training.endings()]


def rank_1(slurm):
    return next(pid for pid in slurm.processes() if "SLURM_PROCID=1" in slurm.environ(pid))


def test_two_nodes_to_the_end(slurm, training):
    job = training.submit("--nodes=2", FAKE_STEP=0.01)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))
    assert "rank 0 of 2 on n1" in training.output(job)
    assert "rank 1 of 2 on n2" in (training.run / "logs/rank_00001.txt").read_text()
    assert (training.run / f"logs/job_{job}.txt").resolve() == training.logs / f"job-{job}.txt"
    assert kinds(training) == ["finished"]
    # a finished stage is not run again
    again = training.submit("--nodes=2")
    assert slurm.wait_for(again)["JobState"] == "COMPLETED"
    assert "already finished" in training.output(again)
    assert len(training.endings()) == 1


@pytest.mark.slow
def test_stopped_in_three_ways_and_no_step_is_lost(slurm, training, out_of_time):
    job = training.submit("--nodes=2", FAKE_STEP=0.1)
    training.at_step(5)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # as before the time limit
    slurm.start_now(job)
    training.at_step(12)
    slurm.run("scancel", "--signal=TERM", str(job))  # as at preemption without --signal: the ranks alone
    slurm.start_now(job)
    training.at_step(20)
    slurm.run("scontrol", "requeue", str(job))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))  # nothing lost, nothing done twice
    assert kinds(training)[:2] == ["stop", "stop"]
    assert kinds(training)[2] in ("outside", "lost")
    assert kinds(training)[3:] == ["finished"]
    assert "SIGUSR1" in training.endings()[0]["reason"], training.endings()
    assert "SIGTERM" in training.endings()[1]["reason"]


@pytest.mark.slow
def test_cancelled_job_stays_cancelled_even_while_it_saves(slurm, training):
    job = training.submit("--nodes=2", FAKE_STEP=0.3)
    training.at_step(2)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.run("scancel", str(job))
    assert slurm.wait_for(job)["JobState"] == "CANCELLED", training.output(job)
    slurm.wait(training.endings, "the ending")
    assert kinds(training) == ["cancelled"]
    assert slurm.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_crash_is_started_again_but_not_a_third_time_at_one_step(slurm, training):
    job = training.submit("--nodes=2", FAKE_CRASH="1:12", FAKE_STEP=0.01)
    for _ in range(2):
        slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "FAILED"
    assert [(ending["requeued"], ending["step"]) for ending in training.endings()] == [
        (True, 12),
        (True, 12),
        (False, 12),
    ]
    end = training.output(job)[-1000:]
    assert "first error: rank_00001: Traceback" in end
    assert "ValueError: a made-up fault" in end
    assert "3 times at step 12" in end


@pytest.mark.slow
def test_killed_rank_and_frozen_rank(slurm, training):
    job = training.submit("--nodes=2", STALL_SECONDS=3)
    training.at_step(12)
    slurm.kill(rank_1(slurm))
    slurm.start_now(job)
    training.at_step(22)
    slurm.freeze(rank_1(slurm))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert kinds(training) == ["crash", "crash", "finished"]
    assert "signal 9" in training.endings()[0]["reason"]
    assert "nothing was written for 3 s" in training.endings()[1]["reason"]
    steps = training.steps()
    assert (steps.count(10), steps.count(20), steps[-1]) == (
        1,
        1,
        30,
    )  # saved there: only later steps are done again


@pytest.mark.slow
def test_ranks_that_do_not_save_in_time_are_killed(slurm, training):
    job = training.submit("--nodes=2", SAVE_SECONDS=1)
    training.at_step(12)
    slurm.freeze(rank_1(slurm))
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.wait(training.endings, "the ending")
    assert "did not save within 1 s" in training.endings()[0]["reason"]
    assert training.endings()[0]["requeued"]


@pytest.mark.slow
def test_node_dies_and_the_job_goes_to_another(slurm, training):
    job = training.submit("--nodes=1", FAKE_STEP=0.1)
    training.at_step(12)
    node = slurm.job(job)["NodeList"]
    slurm.kill_node(node)
    try:
        slurm.start_now(job)
        assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
        assert slurm.job(job)["NodeList"] != node
    finally:
        slurm.revive_node(node)
    assert kinds(training) == ["lost", "finished"]
    assert training.steps().count(10) == 1


@pytest.mark.parametrize(("stage", "says"), [("no_such_stage", "unknown"), ("{stage} optm.lr=1", "optm")])
def test_user_error_ends_the_job(slurm, training, stage, says):
    training.stage, *overrides = stage.format(stage=training.stage).split()
    job = training.submit("--nodes=2", overrides=overrides)
    assert slurm.wait_for(job)["JobState"] == "FAILED"
    assert "error: " in training.output(job)
    assert says in training.output(job)


@pytest.mark.slow
def test_two_jobs_at_one_run(slurm, training):
    job = training.submit("--nodes=1", FAKE_STEP=0.2)
    training.at_step(1)
    second = training.submit("--nodes=1")
    assert slurm.wait_for(second)["JobState"] == "FAILED"
    assert f"job {job} is already at" in training.output(second)
    (training.run / "stop").touch()
    assert slurm.wait_for(job)["JobState"] == "FAILED"
    assert "remove it and submit again" in training.output(job)


@pytest.mark.slow
def test_a_job_runs_in_the_container_that_is_named(slurm, training):
    image, apptainer = training.folder / "li-dit.sif", training.folder / "apptainer"
    image.touch()
    runs = (
        f'echo inside >> {image}; while [ "$1" != python ]; do shift; done; exec {training.python} "${{@:2}}"'
    )
    apptainer.write_text(f"#!/bin/bash\n{runs}\n")
    apptainer.chmod(0o755)
    path = f"{training.folder}:{slurm.environment['PATH']}"
    # as on a cluster, where the image has no Slurm and the host no Python of ours
    job = training.submit("--nodes=2", CONTAINER=image, PYTHON="/nowhere", PATH=path, FAKE_STEP=0.01)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))
    # the start, two ranks, the end
    assert image.read_text().split() == ["inside"] * 4


@pytest.mark.slow
def test_one_process_per_gpu(slurm, training):
    job = training.submit("--partition=gpu", "--gpus-per-node=2", FAKE_STEP=0.01)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert "rank 0 of 2 on g1" in training.output(job)


@pytest.mark.slow
def test_time_limit(slurm, out_of_time):
    training, job = out_of_time
    slurm.wait(training.endings, "the signal", seconds=70)
    first = training.endings()[0]
    assert first["kind"] == "stop", training.output(job)
    assert first["requeued"]
    assert "SIGUSR1" in first["reason"]
    # it waits for its second start, or has had it if the other tests took longer than the wait
    slurm.wait(
        lambda: slurm.job(job)["Reason"] == "BeginTime" or int(slurm.job(job)["Restarts"]), "the requeue"
    )
    slurm.run("scancel", str(job))
    steps = training.steps()
    assert steps == list(range(1, len(steps) + 1))  # the second start goes on where the first one stopped
    assert first["step"] in steps
