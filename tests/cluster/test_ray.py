"""What cluster/ray.sh starts; no Slurm is needed. `tests/data_prep/test_ray.py` has a real Ray cluster."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from data_prep.__main__ import parse
from data_prep.engines import Ray

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {
    "scontrol": "case $2 in hostnames) echo n1 ;; *) echo 'N=1 NodeAddr=10.0.0.1 X=1' ;; esac",
    # Without SRUN_CODE, the steps run too; `none` is a Ray that does not start.
    "srun": "printf '%s\\n' \"$@\"; case ${SRUN_CODE:-} in '') exec bash -c \"${@: -1}\" ;; none) exit 0 ;; "
    "*) exit $SRUN_CODE ;; esac",
    "python": "exit ${PYTHON_CODE:-0}",
}


def job(tmp_path, *words, **environment):
    """Run cluster/ray.sh as Slurm does, from a copy, with make-believe programs; return what it did."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "env.sh").write_text(
        f"PYTHON={tmp_path}/bin/python\nCONTAINER=${{CONTAINER:-}}\nSRUN_OPTIONS=()\n"
    )
    (tmp_path / "my data.yaml").write_text("name: ds\n")
    (tmp_path / "slurm_script").write_text((ROOT / "cluster/ray.sh").read_text())
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    return subprocess.run(
        ["bash", str(tmp_path / "slurm_script"), *words],
        cwd=ROOT,
        env={
            **os.environ,
            **slurm,
            "SLURM_CPUS_ON_NODE": "8",
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "LI_DIT_ENV": str(tmp_path / "env.sh"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("options", "steps"),
    [([], ["plan", "pairs"]), (["--steps=latents,text,verify"], ["latents", "text", "verify"])],
)
@pytest.mark.parametrize("container", ["", "/images/li-dit.sif"])
def test_all_nodes_start_ray_and_the_first_runs_the_steps(tmp_path, options, steps, container):
    dataset = str(tmp_path / "my data.yaml")
    done = job(tmp_path, *options, dataset, "seed=3", CONTAINER=container)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    ray = words[words.index("symmetric-run") :]
    assert ray[:5] == ["symmetric-run", "--address", "10.0.0.1:20070", "--min-nodes", "2"]
    assert ray[5:10] == ["--num-cpus", "8", "--", "bash", "-c"]
    first, *commands, last = [shlex.split(command) for command in ray[10].split(" && ")]
    assert (first, last[0]) == (["true"], "touch")
    assert not (ROOT / last[1]).exists()
    for command, step in zip(commands, steps, strict=True):
        assert command[:3] == ["python" if container else f"{tmp_path}/bin/python", "-m", "data_prep"]
        arguments = parse(command[3:])
        assert (arguments.command, str(arguments.dataset), arguments.overrides) == (step, dataset, ["seed=3"])
        assert arguments.task == Ray()


def test_what_is_missing_is_one_line(tmp_path):
    for number, (words, environment, says) in enumerate(
        [
            (["absent.yaml"], {}, "absent.yaml: no such file"),
            (["--steps=pairs"], {}, "no dataset named"),
            (["pyproject.toml"], {"PYTHON_CODE": "1"}, "no Ray here"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        done = job(tmp_path / str(number), *words, **environment)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert says in line


@pytest.mark.parametrize(("given", "code"), [("2", 2), ("none", 1)])
def test_the_code_of_the_steps_is_that_of_the_job(tmp_path, given, code):
    done = job(tmp_path, str(tmp_path / "my data.yaml"), SRUN_CODE=given)
    assert done.returncode == code
    assert "committed parts are kept" in done.stdout
    assert ("Ray did not start" in done.stdout) == (given == "none")
