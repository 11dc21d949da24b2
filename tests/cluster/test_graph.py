"""Submitting by hand, chains of stages, arrays, and the whole graph, on a real Slurm."""

import json

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def jobs_of(printed):
    """(job, what it waits for) of each line that a script printed: `12  train a.yaml  afterok:11`."""
    rows = [line.split() for line in printed.splitlines() if line.split()[0].isdigit()]
    return [(row[0], row[-1] if ":" in row[-1] else "") for row in rows]


def done(training):
    """(command, share) of every make-believe command that was run."""
    path = training.folder / "done.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        (row["command"][1] if row["command"][0] == "data_prep" else row["command"][0], tuple(row["share"]))
        for row in rows
    ]


@pytest.fixture
def dataset(training):
    path = training.folder / "set.yaml"
    path.write_text(f"name: set\nstore: {training.folder}/store\n")
    return path


@pytest.mark.slow
def test_by_hand_checks_first_and_then_submits_and_the_nodes_are_checked(slurm, training):
    printed = training.type("cluster/train.sh", "--nodes=2", str(training.stage), FAKE_STEP=0.01, PREFLIGHT=1)
    job = int(printed.split()[-1])
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert slurm.job(job)["JobName"] == "fake"
    assert "preflight: 2 nodes, 2 processes, 0 GPUs, all-reduce" in training.output(job)


@pytest.mark.slow
def test_bad_node_is_named_and_excluded(slurm, training):
    break_n1 = '[ "$SLURMD_NODENAME" != n1 ] || export PREFLIGHT_SHM_GB=999999'
    job = training.submit("--nodes=1", FAKE_STEP=0.01, PREFLIGHT=1, FAKE_NODE=break_n1)
    slurm.start_now(job)
    assert slurm.wait_for(job)["JobState"] == "COMPLETED", training.output(job)
    assert "preflight: n1 is bad: /dev/shm has" in training.output(job)
    assert [(ending["kind"], ending["nodes"]) for ending in training.endings()] == [
        ("bad_node", "n1"),
        ("finished", "n2"),
    ]
    assert slurm.job(job)["ExcNodeList"] == "n1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demoo"], "did you mean `demo`"),
        (["--nodes=9", "{stage}"], "configuration is not available"),
        pytest.param(["{stage}", "data.store={stage}/none"], "none", marks=pytest.mark.slow),
        pytest.param(["{stage}", "model.preset=li_dit_10b"], "needs GPUs", marks=pytest.mark.slow),
        pytest.param(["{stage}", "start_from=runs/none"], "no such run", marks=pytest.mark.slow),
        (["{stage}", "--nodes=2"], "--nodes=2: write sbatch options before the rest"),
        (
            ["--array=0-2000", "{stage}"],
            "array specification: the last task is at most 1000 here",
        ),
    ],
)
def test_refused_before_anything_is_submitted(slurm, training, arguments, says):
    before = slurm.run("squeue", "-h", "-t", "all")
    failed = training.attempt("cluster/train.sh", *(word.format(stage=training.stage) for word in arguments))
    assert failed.returncode == 2
    assert says in failed.stderr
    assert slurm.run("squeue", "-h", "-t", "all") == before


@pytest.mark.slow
def test_finished_stages_are_passed_over_and_a_failure_takes_those_after_it_along(slurm, training):
    names = [str(training.add_stage(name)) for name in ("a", "b", "c")]
    for name, file in (("a", "finished.json"), ("b", "stop")):
        (training.folder / "runs" / name).mkdir(parents=True)
        (training.folder / "runs" / name / file).write_text("{}")
    jobs = jobs_of(training.type("cluster/stages.sh", *names, "samples=40"))
    assert [after for _, after in jobs] == ["", f"afterok:{jobs[0][0]}", f"afterok:{jobs[1][0]}"]
    assert f"start_from={training.folder}/runs/b" in slurm.run("scontrol", "show", "job", "-o", jobs[2][0])
    assert [slurm.wait_for(job)["JobState"] for job, _ in jobs] == ["COMPLETED", "FAILED", "CANCELLED"]


def test_tasks_of_a_plan_wait_for_one_another(slurm, training, dataset):
    array = training.type("sbatch", "--parsable", "--array=0-2%1", "cluster/pairs.sh", str(dataset)).strip()
    for task in (0, 1):
        slurm.start_now(f"{array}_{task}")
    slurm.wait(lambda: not slurm.queue(), "the array's end")
    assert {share for what, share in done(training) if what == "pairs"} == {(0, 3), (1, 3), (2, 3)}
    first_pairs = [what for what, _ in done(training)].index("pairs")
    assert {share for what, share in done(training)[:first_pairs] if what == "plan"} == {
        (0, 3),
        (1, 3),
        (2, 3),
    }


def test_tasks_that_wait_for_one_that_is_gone_name_it_and_end(slurm, training, dataset):
    """An array without --plan, of which one task was canceled for good."""
    array = training.type("sbatch", "--parsable", "--array=4-6%1", "cluster/pairs.sh", str(dataset)).strip()
    slurm.run("scancel", f"{array}_5")
    slurm.wait(lambda: not slurm.queue(), "the array's end")
    assert "pairs" not in {what for what, _ in done(training)}
    printed = "".join(path.read_text() for path in training.logs.iterdir())
    assert printed.count("tasks that are no longer queued: run them again, LI_DIT_TASKS=3") == 2
    assert f"sbatch --array=5 cluster/pairs.sh {dataset}" in printed


@pytest.mark.slow
def test_memory_is_asked_for_in_the_way_that_the_site_wants(slurm, training):
    jobs = {}
    for option in ("--hold", "--mem-per-cpu=100"):
        printed = training.type("cluster/train.sh", "--hold", option, str(training.stage))
        jobs[option] = slurm.run("scontrol", "show", "job", "-o", printed.split()[-1])
    assert "MinMemoryNode=0" in jobs["--hold"]
    assert "MinMemoryCPU=100M" in jobs["--mem-per-cpu=100"]


@pytest.mark.slow
def test_what_is_submitted_from_an_interactive_step_runs(slurm, training):
    """The step's own way of asking for memory is in the environment of what is submitted from it."""
    step = ("srun", "--ntasks=1", "--mem-per-cpu=100")
    job = training.type(*step, "sbatch", "--parsable", "cluster/train.sh", str(training.stage)).split()[-1]
    ended = slurm.wait_for(job)["JobState"]
    assert ended == "COMPLETED", "".join(path.read_text() for path in training.logs.iterdir())


def test_task_that_was_killed_is_named_and_run_again(slurm, training, dataset):
    printed = training.type("cluster/encode.sh", str(dataset), FAKE_SECONDS=2)
    encode, snapshot = (line.split()[1] for line in printed.splitlines())
    slurm.wait(lambda: ("text", (1, 3)) in done(training), "task 1")
    slurm.run("scancel", f"{encode}_1")
    assert slurm.wait_for(snapshot)["JobState"] == "FAILED"
    again = next(
        line.split("`")[1]
        for path in training.logs.iterdir()
        for line in path.read_text().splitlines()
        if "`" in line
    )
    assert "--array=1 " in again
    variable, *words = again.split()
    training.type(*words, **dict([variable.split("=")]))
    slurm.wait(lambda: not slurm.queue(), "the task's end")
    assert (training.folder / "text.1").exists()


@pytest.mark.slow
def test_whole_graph(slurm, training, dataset):
    stages = [str(training.add_stage(name)) for name in ("a", "b")]
    printed = training.type("cluster/pretrain.sh", str(dataset), *stages, "samples=40", FAKE_STEP=0.01)
    jobs = jobs_of(printed)
    conditions = ["", "afterok", "afterok", "afterany", "afterok", "afterok", "afterok"]
    before = ["", *(job for job, _ in jobs)]
    assert [after for _, after in jobs] == [
        f"{word}:{job}".strip(":") for word, job in zip(conditions, before, strict=False)
    ]
    assert slurm.wait_for(jobs[-1][0], seconds=60)["JobState"] == "COMPLETED", printed
    order = list(dict.fromkeys(what for what, _ in done(training)))
    assert order[:2] == ["plan", "pairs"]
    assert set(order[2:4]) == {"latents", "text"}
    assert order[4:] == ["snapshot", "pipeline.sample"]
    assert (training.folder / "runs/b/finished.json").exists()
