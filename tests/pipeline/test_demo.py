"""The demo's plan, which a stopped demo keeps, and what ends it before it begins: each one line that says
what to do, and nothing half-written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.config import load_dataset
from model.common.errors import UserError
from pipeline import demo
from pipeline.demonstration.plan import VAE_SHARE
from tests.helpers.learned import LEARNED

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("missing", demo.DEMOS["emoji"].packages)
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


class FakeDemo:
    """The demo with commands that take no time, and a training that stops and fails when it should."""

    def __init__(self, folder, monkeypatch):
        self.run, self.commands, self.trained = folder / "demo", [], []
        self.fails, self.rate = False, 50.0
        self.monkeypatch, self.folder = monkeypatch, folder
        monkeypatch.setattr(demo, "run", lambda *arguments: self.commands.append(arguments))
        monkeypatch.setattr(demo, "train", self.train)
        monkeypatch.setattr(demo, "measure", lambda run, pairs: LEARNED)
        monkeypatch.setattr(demo, "write_report", lambda *_: self.run / "report.html")
        emoji = replace(demo.DEMOS["emoji"], ending=self.ending)
        monkeypatch.setattr(demo, "DEMOS", {**demo.DEMOS, "emoji": emoji})

    def train(self, stage, arguments, stop_after):
        if "name=speed" in arguments:
            (stage.run / "speed").mkdir(parents=True)
            report = {"step": 20, "samples": 1280, "time": 0.0, "samples_per_second": self.rate}
            (stage.run / "speed" / "metrics.jsonl").write_text(json.dumps(report) + "\n")
        elif self.fails:
            raise SystemExit(1)
        else:
            self.trained.append((arguments, stop_after))

    def ending(self, stage, dataset, images):
        self.images = images
        return SimpleNamespace(sample_images=lambda: None, measure=dict)

    def start(self, *arguments):
        self.monkeypatch.setattr(sys, "argv", ["demo", f"runs={self.folder}", *arguments])
        demo.main()

    @property
    def plan(self):
        return json.loads((self.run / "plan.json").read_text())


@pytest.fixture
def fake_demo(tmp_path, monkeypatch):
    return FakeDemo(tmp_path, monkeypatch)


def test_both_halves_of_the_training_have_the_planned_length(fake_demo):
    fake_demo.start("minutes=5")
    plan = fake_demo.plan
    assert plan["minutes"] == 5
    # of 300 seconds at 50 samples/s, the trial's steps and the end take a part
    assert 5000 < plan["samples"] < 300 * 50
    (first, stop), (second, to_the_end) = fake_demo.trained
    assert first == second == ["demo", f"runs={fake_demo.folder}", f"samples={plan['samples']}"]
    assert (stop, to_the_end) == (plan["samples"] // 2, None)
    assert fake_demo.images == plan["images"]
    assert not (fake_demo.run / "speed").exists()

    vae = next(command for command in fake_demo.commands if command[0] == "pipeline.train_vae")
    assert float(vae[vae.index("--minutes") + 1]) == pytest.approx(VAE_SHARE * 5)


def test_a_stopped_demo_goes_on_with_its_plan_on_a_machine_of_another_speed(fake_demo):
    fake_demo.fails = True
    with pytest.raises(SystemExit):
        fake_demo.start("minutes=5")
    plan, commands = fake_demo.plan, len(fake_demo.commands)

    fake_demo.fails, fake_demo.rate = False, 500.0
    fake_demo.start("minutes=5")
    assert fake_demo.plan == plan
    assert len(fake_demo.commands) == commands
    assert [arguments[-1] for arguments, _ in fake_demo.trained] == [f"samples={plan['samples']}"] * 2


def test_a_demo_of_other_minutes_is_not_continued(fake_demo, capsys):
    fake_demo.start("minutes=5")
    with pytest.raises(SystemExit) as exit:
        fake_demo.start("minutes=6")
    assert exit.value.code == 2
    assert "minutes differ" in capsys.readouterr().err


def test_a_given_number_of_samples_is_not_planned(fake_demo):
    fake_demo.start("samples=6400")
    assert not (fake_demo.run / "plan.json").exists()
    assert [stop for _, stop in fake_demo.trained] == [3200, None]


@pytest.mark.parametrize(
    ("name", "per_minute"), [("scenes", demo.SCENES_PER_MINUTE), ("video", demo.CLIPS_PER_MINUTE)]
)
def test_the_number_of_scenes_follows_from_the_minutes(name, per_minute, monkeypatch, tmp_path):
    fake = FakeDemo(tmp_path, monkeypatch)
    monkeypatch.setattr(demo, "DEMOS", {name: replace(demo.DEMOS[name], ending=fake.ending)})
    fake.run = tmp_path / f"demo_{name}"
    monkeypatch.setattr(sys, "argv", ["demo", name, f"runs={tmp_path}", "minutes=0.5"])
    demo.main()
    prepare = [command for command in fake.commands if command[0] == "data_prep"]
    # The images that the network of clips starts from are as many for any time.
    first = [command for command in prepare if Path(command[2]).stem == demo.DEMOS[name].first]
    assert len(first) == (5 if demo.DEMOS[name].first else 0)
    prepare = [command for command in prepare if command not in first]
    assert len(prepare) == 5
    for _, _, yaml, change in prepare:
        config = load_dataset(Path(yaml), [change])
        assert config.sources[0].scenes.count == per_minute / 2
        assert config.sources[0].captions == {"list": "list"}
    # pixels need no VAE
    assert all(command[0] != "pipeline.train_vae" for command in fake.commands)


@pytest.mark.parametrize("minutes", ["0", "-3", "inf", "nan", "long"])
def test_minutes_have_to_be_a_number_above_zero(minutes):
    with pytest.raises(UserError, match="give a number above 0"):
        demo.parse([f"minutes={minutes}"])


def test_the_command_line_names_the_demo_its_minutes_and_settings():
    assert demo.parse([])[1:] == (8, [])
    assert demo.parse(["scenes"])[0].name == "demo_scenes"
    assert demo.parse(["scenes"])[1] == 30
    assert demo.parse(["optim.lr=1", "minutes=2.5"])[1:] == (2.5, ["optim.lr=1"])


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
