"""What cluster/encode.sh says of arrays; no Slurm is needed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SBATCH = '#!/bin/bash\n[ "$1" = --test-only ] || echo 17\n'


def typed(tmp_path, *words, options="(--array=0-15%8)"):
    """Type cluster/encode.sh with a make-believe sbatch, and return what it printed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "env.sh").write_text(f"PYTHON=/bin/true\nENCODE_OPTIONS={options}\n")
    (tmp_path / "ds.yaml").write_text("name: ds\n")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    more = {"PATH": path, "LI_DIT_ENV": str(tmp_path / "env.sh")}
    words = [word.replace("DATASET", str(tmp_path / "ds.yaml")) for word in words]
    return subprocess.run(
        ["cluster/encode.sh", *words],
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
