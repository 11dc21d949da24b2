"""The life of a training job on a real Slurm: two nodes on this machine, a make-believe trainer."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(90)]


def test_two_nodes_to_the_end(slurm, training):
    job = training.submit("--nodes=2", FAKE_STEP=0.01)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))
    assert "rank 0 of 2 on n1" in training.output(job)
    assert "rank 1 of 2 on n2" in (training.run / "logs/rank_00001.txt").read_text()
    assert (training.run / f"logs/job_{job}.txt").resolve() == training.folder / f"job-{job}.txt"
    assert [ending["kind"] for ending in training.endings()] == ["finished"]
    # a finished stage is not run again
    again = training.submit("--nodes=2")
    assert slurm.wait_for(again)["JobState"] == "COMPLETED"
    assert "already finished" in training.output(again)
    assert len(training.endings()) == 1


def test_saves_queues_itself_again_and_resumes(slurm, training):
    job = training.submit("--nodes=2")
    training.at_step(12)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))  # nothing lost, nothing done twice
    assert [ending["kind"] for ending in training.endings()] == ["stop", "finished"]
    assert "SIGUSR1" in training.endings()[0]["reason"]


def test_signal_to_the_ranks_alone(slurm, training):
    job = training.submit("--nodes=2")
    training.at_step(3)
    slurm.run("scancel", "--signal=TERM", str(job))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps() == list(range(1, 31))


def test_cancelled_job_stays_cancelled_even_while_it_saves(slurm, training):
    job = training.submit("--nodes=2", FAKE_STEP=0.3)
    training.at_step(2)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    slurm.run("scancel", str(job))
    assert slurm.wait_for(job)["JobState"] == "CANCELLED", training.output(job)
    slurm.wait(lambda: training.endings(), "the ending")
    assert training.endings()[0]["kind"] == "cancelled"
    assert slurm.job(job)["JobState"] == "CANCELLED"


def test_crash_is_started_again_but_not_a_third_time_at_one_step(slurm, training):
    job = training.submit("--nodes=2", FAKE_CRASH="1:12", FAKE_STEP=0.01)
    for _ in range(2):
        slurm.start_now(job)
        slurm.wait(lambda: slurm.job(job)["JobState"] != "PENDING", "a new start")
    assert slurm.wait_for(job)["JobState"] == "FAILED"
    assert [ending["requeued"] for ending in training.endings()] == [True, True, False]
    assert {ending["step"] for ending in training.endings()} == {12}
    end = training.output(job)[-1000:]
    assert "first error: rank_00001: Traceback" in end
    assert "ValueError: a made-up fault" in end
    assert "3 times at step 12" in end


def test_killed_rank(slurm, training):
    job = training.submit("--nodes=2")
    training.at_step(12)
    rank_on_n2 = next(pid for pid in slurm.processes() if "SLURM_PROCID=1" in slurm.environ(pid))
    slurm.kill(rank_on_n2)
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert "signal 9" in training.endings()[0]["reason"]
    assert training.steps()[-1] == 30
    assert training.steps().count(10) == 1  # saved at 10: only what came after is done again


def test_frozen_rank(slurm, training):
    job = training.submit("--nodes=2", STALL_SECONDS=3)
    training.at_step(12)
    slurm.freeze(next(pid for pid in slurm.processes() if "SLURM_PROCID=1" in slurm.environ(pid)))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert "nothing was written for 3 s" in training.endings()[0]["reason"]


def test_requeued_from_outside(slurm, training):
    job = training.submit("--nodes=2")
    training.at_step(12)
    slurm.run("scontrol", "requeue", str(job))
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert training.steps()[-1] == 30


@pytest.mark.parametrize(("stage", "says"), [("no_such_stage", "unknown"), ("{stage} optm.lr=1", "optm")])
def test_user_error_ends_the_job(slurm, training, stage, says):
    training.stage, *overrides = stage.format(stage=training.stage).split()
    job = training.submit("--nodes=2", overrides=overrides)
    assert slurm.wait_for(job)["JobState"] == "FAILED"
    assert "error: " in training.output(job)
    assert says in training.output(job)
