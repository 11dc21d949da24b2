"""The container files: they copy what exists, install by the constraints, agree with each other and pass
hadolint; and the scripts of the cluster run Python inside of the image that is named."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "apptainer.def").read_text()
FAKE_APPTAINER = """#!/bin/bash
echo "apptainer $*"
while [ "$1" != python ]; do shift; done
shift
IN_CONTAINER=1 exec {python} "$@"
"""


def commands(text):
    """The shell commands of a file of either kind, one line each."""
    text = re.sub(r"\\\n\s*&&", "\n", text)
    lines = (line.strip().removeprefix("RUN ") for line in text.splitlines())
    return [line for line in lines if re.match(r"(apt-get|rm|pip) ", line)]


def sections(text):
    """The sections of an Apptainer definition by their names; the header is the one without a name."""
    return dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", "%header\n" + text, re.MULTILINE | re.DOTALL))


def docker_files():
    """What the Dockerfile copies."""
    files = []
    for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        assert target.startswith("./"), line
        files += sources
    return files


def test_both_files_say_the_same():
    parts = sections(DEFINITION)
    assert set(parts) == {"header", "files", "post", "environment", "runscript"}
    base = re.search(r"^FROM (.*)", DOCKERFILE, re.MULTILINE)[1]
    assert f"Bootstrap: docker\nFrom: {base}\n" in parts["header"]
    copied = [line.split() for line in parts["files"].strip().splitlines()]
    assert [source for source, _ in copied] == docker_files()
    assert {target for _, target in copied} == {re.search(r"WORKDIR (.*)", DOCKERFILE)[1] + "/"}
    assert commands(parts["post"]) == commands(DOCKERFILE)
    assert len(commands(DOCKERFILE)) == 5


def test_what_is_copied_is_enough_to_install_and_holds_no_secret():
    files = docker_files()
    assert all((ROOT / file).exists() for file in files)
    packages = [name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *packages} <= set(files)
    # nothing else reaches the builder
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().split() if line[0] in "*!"]
    assert first == "*"
    assert [rule[1:] for rule in rules if rule.startswith("!")] == files
    assert not re.search(r"(?i)\b(ARG|ENV|ADD)\b|token|secret|password|credential", DOCKERFILE + DEFINITION)


def test_versions_are_those_of_the_constraints():
    installs = [line for line in commands(DOCKERFILE) if line.startswith("pip ")]
    assert installs
    for line in installs:
        assert " -c constraints.txt " in line
        assert "==" not in line
    extras = re.search(r"'\.\[(.*)\]'", installs[0])[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    version = re.search(r"^FROM python:([\d.]+)-", DOCKERFILE, re.MULTILINE)[1]
    assert version in SpecifierSet(PROJECT["project"]["requires-python"])


def test_hadolint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint: install the extra test")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- the scripts of the cluster ------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path):
    """An image, and a folder with an `apptainer` that runs the command here and says so."""
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text(FAKE_APPTAINER.format(python=sys.executable))
    apptainer.chmod(0o755)
    image = tmp_path / "li-dit.sif"
    image.touch()
    return image, apptainer.parent


def python(*arguments, image, path):
    """Run $PYTHON as the scripts do, in a shell that has read `cluster/env.sh`."""
    script = '. cluster/jobs.sh; open_script x; exec "$PYTHON" "$@"'
    environment = {"PATH": f"{path}:/usr/bin:/bin", "CONTAINER": str(image), "HOME": os.environ["HOME"]}
    return subprocess.run(
        ["bash", "-c", script, "bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_named_image_runs_python_inside(fake):
    image, path = fake
    code = "import os, sys; print(os.environ['IN_CONTAINER'], sys.argv[1:], os.getcwd())"
    done = python("-c", code, "a b", "*", image=image, path=path)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    nv = "--nv " if Path("/dev/nvidiactl").exists() else ""
    assert first.startswith(f"apptainer exec {nv}{image} python -c ")
    assert last == f"1 ['a b', '*'] {ROOT}"


def test_exit_codes_come_out_of_the_container(fake):
    image, path = fake
    assert python("-c", "raise SystemExit(85)", image=image, path=path).returncode == 85


def test_no_image_and_no_apptainer_are_one_line(fake, tmp_path):
    image, path = fake
    missing = python("-c", "", image=tmp_path / "none.sif", path=path)
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"error: CONTAINER={tmp_path}/none.sif: no such image: make it with")
    without = python("-c", "", image=image, path="/nowhere")
    assert without.returncode == 2
    assert without.stderr.startswith("error: no apptainer on ")
    assert len(missing.stderr.splitlines()) == len(without.stderr.splitlines()) == 1


def test_without_an_image_python_is_that_of_the_environment():
    done = subprocess.run(
        ["bash", "-c", '. cluster/env.sh; echo "$PYTHON"'],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == sys.executable
