"""An ablation as a Slurm array, by the line that `pipeline.ablate --dry-run` prints, on a real Slurm."""

import json
import shlex

import pytest

from tests.helpers.fake_ablate import fake_score

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(180)]

ROWS = """
rows:
  none: {settings: ["fusion.families=[llm]", fusion.mode=none, fusion.refiner=none]}
  full: {settings: ["fusion.families=[llm]", fusion.mode=none]}
"""


def test_the_line_that_is_printed_does_what_is_not_done(slurm, training, tmp_path):
    (tmp_path / "rows.yaml").write_text(ROWS)
    words = [str(training.stage), "--rows", str(tmp_path / "rows.yaml"), "--seeds", "2", "--scored", "4"]
    folder = tmp_path / "runs" / "fake_ablation"
    there = folder / "none" / "seed_0"
    there.mkdir(parents=True)
    (there / "score.json").write_text(json.dumps(fake_score(-1)))

    printed = training.type(training.real_python, "-m", "pipeline.ablate", *words, "--dry-run")
    assert printed.splitlines()[:2] == [f"{'none':20} 1 of 2 runs done", f"{'full':20} 0 of 2 runs done"]
    assignment, *line = shlex.split(printed.splitlines()[-1])
    assert line == ["sbatch", "--array=1-3", "--gpus-per-node=1", "cluster/run.sh", "pipeline.ablate", *words]
    line.remove("--gpus-per-node=1")  # the nodes with two cores have none
    name, tasks = assignment.split("=")
    job = training.type(line[0], "--parsable", *line[1:], **{name: tasks}).strip()
    slurm.wait(lambda: not slurm.queue(), "end of the array", 110)
    done = {
        path.parent.relative_to(folder): json.loads(path.read_text())["seconds"]
        for path in folder.rglob("score.json")
    }
    said = "\n".join(path.read_text() for path in training.logs.iterdir())
    assert {str(run): task for run, task in done.items()} == {
        "none/seed_0": -1, "full/seed_0": 1, "none/seed_1": 2, "full/seed_1": 3,
    }, f"{job} {said}"  # fmt: skip
