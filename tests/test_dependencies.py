"""Each set of requirements is enough for its commands: they import while all other packages are hidden."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model.common.errors import UserError
from model.common.extras import require

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = {
    # the default: preparation, export, sampling, reports
    "": [
        "data_prep.__main__",
        *("data_prep.families.text", "data_prep.families.latents", "data_prep.report"),
        *("data_prep.families.captions", "data_prep.captioners.in_process"),
        *("pipeline.train_vae", "pipeline.export", "pipeline.sample", "pipeline.diffusers_pipeline"),
        *("pipeline.estimate", "pipeline.report", "pipeline.status"),
    ],
    "train": [
        *("pipeline.train", "pipeline.ablate", "pipeline.demo", "pipeline.data.streaming"),
        "pipeline.text.online",
    ],
    "captions": ["data_prep.captioners.endpoint"],
    "web": ["pipeline.web", "gradio"],
    "video": ["data_prep.__main__", "data_prep.clips.video", "av"],
    "eval": ["pipeline.evaluate", "pipeline.follow", "model.scorers.detectors"],
}
HIDE = """
import importlib, json, sys
from importlib.machinery import PathFinder

class Visible:
    find_distributions = PathFinder.find_distributions

    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

hidden, modules = json.loads(sys.stdin.read())
sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
for module in modules:
    importlib.import_module(module)
"""


def required(extra):
    """Return the names of all packages that an extra, or "", installs, and of those it requires in turn."""
    extras = PROJECT["optional-dependencies"]
    todo = [Requirement(line) for line in PROJECT["dependencies"] + (extras[extra] if extra else [])]
    found = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            lines = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        for line in map(Requirement, lines):
            names = ("", *requirement.extras)
            if line.marker is None or any(line.marker.evaluate({"extra": name}) for name in names):
                todo.append(line)
    return {name for name, _ in found}


ALWAYS = ("", "train")


@pytest.mark.parametrize(
    "extra", [extra if extra in ALWAYS else pytest.param(extra, marks=pytest.mark.slow) for extra in COMMANDS]
)
def test_an_extra_is_enough_for_its_commands(extra):
    allowed = required(extra) | {"li-dit"}
    hidden = []
    for package in distributions():
        if canonicalize_name(package.name) not in allowed:
            hidden += (package.read_text("top_level.txt") or package.name.replace("-", "_")).split()
    assert {"pytest", "moto", "hypothesis"} <= set(hidden)
    if extra != "train":
        assert {"deepspeed", "streaming", "oci"} <= set(hidden)
    done = subprocess.run(
        [sys.executable, "-c", HIDE],
        input=json.dumps([hidden, COMMANDS[extra]]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_a_training_rank_and_a_plan_do_not_wait_for_packages_that_they_do_not_use():
    heavy = {"pipeline.train": ["transformers", "diffusers", "matplotlib"], "data_prep.__main__": ["torch"]}
    for module, packages in heavy.items():
        code = f"import sys, {module}; print([name for name in {packages} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_no_package_is_compiled_and_none_is_pinned_that_nothing_requires():
    pinned = {
        canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert pinned.isdisjoint({"llama-cpp-python", "llm", "openai"})
    needed = set().union(*(required(extra) for extra in ("", *PROJECT["optional-dependencies"])))
    installed = {canonicalize_name(package.name) for package in distributions()}
    assert needed & installed - {"setuptools"} <= pinned


def test_a_missing_package_is_one_line_with_its_extra():
    require("train", "torch")
    with pytest.raises(UserError, match=r"package no_such_module is missing.*'\.\[train\]'"):
        require("train", "no_such_module")
