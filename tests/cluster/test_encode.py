"""What cluster/encode.sh and pairs.sh submit and run; no Slurm is needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SBATCH = '#!/bin/bash\n[ "$1" = --test-only ] || echo 17\n'


def typed(tmp_path, *words, options="(--array=0-15%8)", script="encode", keys=""):
    """Type cluster/encode.sh, or another script, with a make-believe sbatch, and return what it printed."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "env.sh").write_text(f"PYTHON=/bin/true\nENCODE_OPTIONS={options}\n")
    (tmp_path / "ds.yaml").write_text("name: ds\n" + keys)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    more = {"PATH": path, "LI_DIT_ENV": str(tmp_path / "env.sh")}
    words = [word.replace("DATASET", str(tmp_path / "ds.yaml")) for word in words]
    return subprocess.run(
        [f"cluster/{script}.sh", *words],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("(--array=0-15)", []),
        ("(--array=0-15%8)", ["--array=0-63"]),
        ("(--array=0-15%8)", ["-a0,1,5"]),
        ("(--gpus-per-node=1)", ["--array=0-3"]),
    ],
)
def test_an_array_without_a_limit_is_warned_of_and_submitted(tmp_path, options, words):
    done = typed(tmp_path, *words, "DATASET", options=options)
    assert "has no %: if all of its tasks run at once" in done.stderr
    assert done.stdout.splitlines() == ["encode 17", "snapshot 17"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("(--array=0-15%8)", []),
        ("(--array=0-15)", ["--array=0-63%16"]),
        ("(--array=0-15)", ["--array=7"]),
        ("()", []),
    ],
)
def test_other_arrays_are_not(tmp_path, options, words):
    done = typed(tmp_path, *words, "DATASET", options=options)
    assert "warning" not in done.stderr
    assert done.stdout.splitlines() == ["encode 17", "snapshot 17"]


def test_the_help_says_how_many_tasks(tmp_path):
    assert "four tasks per GPU or more" in typed(tmp_path, "--help").stdout


def run_task(tmp_path, keys="", scontrol=None, **slurm):
    """Run a task of encode.sh with a make-believe Python, and return what it printed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "$3" >> {tmp_path}/steps\n')
    (tmp_path / "python").chmod(0o755)
    if scontrol is not None:
        (tmp_path / "bin/scontrol").write_text(f"#!/bin/bash\n{scontrol}\n")
        (tmp_path / "bin/scontrol").chmod(0o755)
    (tmp_path / "env.sh").write_text(f"PYTHON={tmp_path}/python\n")
    (tmp_path / "ds.yaml").write_text("name: ds\n" + keys)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    more = {
        "PATH": path,
        "LI_DIT_ENV": str(tmp_path / "env.sh"),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    # Slurm runs a copy of the script, which is how the script knows that it is a task.
    script = shutil.copy(ROOT / "cluster/encode.sh", tmp_path)
    words = [script, str(tmp_path / "ds.yaml")]
    environment = {**os.environ, **more, **slurm}
    return subprocess.run(
        words, cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("keys", "steps"),
    [("", ["latents", "text"]), ("captions: []\n", ["latents", "captions", "text"])],
)
def test_a_task_captions_its_parts_before_it_encodes_their_text(tmp_path, keys, steps):
    run_task(tmp_path, keys)
    assert (tmp_path / "steps").read_text().split() == steps


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "64", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_JOB_ID": "5"}
FREE, LIMITED = "echo ArrayTaskId=0", "echo ArrayTaskId=0 ArrayTaskThrottle=16"


@pytest.mark.parametrize(
    ("scontrol", "changes", "warns"),
    [
        (FREE, {}, True),
        ("echo ArrayTaskId=0 ArrayTaskThrottle=0", {}, True),
        (LIMITED, {}, False),
        (FREE, {"SLURM_ARRAY_TASK_ID": "3"}, False),
        (FREE, {"SLURM_ARRAY_TASK_COUNT": "1"}, False),
        ("exit 1", {}, False),
        ("echo slurm_load_jobs error", {}, False),
    ],
)
def test_the_first_task_of_an_array_warns_if_nothing_limits_it(tmp_path, scontrol, changes, warns):
    done = run_task(tmp_path, scontrol=scontrol, **{**ARRAY, **changes})
    assert ("scontrol update JobId=5 ArrayTaskThrottle=16" in done.stderr) == warns
    assert ("warning" in done.stderr) == warns
    assert (tmp_path / "steps").read_text().split() == ["latents", "text"]


def test_annotations_are_made_between_the_plan_and_the_pairs(tmp_path):
    done = typed(tmp_path, "DATASET", script="pairs")
    assert done.stdout.split() == ["plan", "17", "pairs", "17"]
    done = typed(tmp_path, "DATASET", script="pairs", keys="annotations: []\n")
    assert done.stdout.split() == ["plan", "17", "annotate", "17", "pairs", "17"]
