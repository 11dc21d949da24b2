"""What ends the demo before it begins: each one line that says what to do, and nothing half-written."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline import demo

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("missing", demo.PACKAGES)
def test_a_missing_package_is_named(missing, monkeypatch, capsys, tmp_path):
    def distribution(name):
        if name == missing:
            raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", distribution)
    monkeypatch.setattr(sys, "argv", ["demo", f"runs={tmp_path}"])
    with pytest.raises(SystemExit) as exit:
        demo.main()
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"package {missing} is not installed: run `make install`" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("python", "no Python 3.11 to 3.13 found"),
        ("disk", "11.9 GB of disk free here, the packages need 12 GB while they are installed: make room"),
    ],
)
def test_make_names_what_the_machine_lacks(missing, says, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "make", "touch"):
        found = next(
            path for folder in os.environ["PATH"].split(":") if (path := Path(folder) / name).exists()
        )
        (programs / name).symlink_to(found)
    if missing != "python":
        (programs / "python3").symlink_to(sys.executable)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {"PATH": str(programs)}
    if missing == "disk":
        (tmp_path / "sitecustomize.py").write_text(
            "import shutil\nfull = shutil.disk_usage('/')._replace(free=11_900_000_000)\nshutil.disk_usage "
            "= lambda path: full\n"
        )
        env["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        ["make", "-s", "demo"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / ".venv").exists()
