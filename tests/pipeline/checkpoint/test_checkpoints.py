"""Checkpoints are exact on any number of processes, and survive crashes, full disks and damaged files."""

import json
import random
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from data_prep.store.store import open_store
from model.common.errors import UserError
from pipeline.checkpoint.base import save_base
from pipeline.checkpoint.checkpoints import Checkpoints, load_weights
from pipeline.engine.layout import Layout
from pipeline.engine.master_weights import RankState
from pipeline.runtime.attempt import Attempt
from pipeline.stage.config import CheckpointConfig
from tests.helpers import checkpoint_tasks as tasks
from tests.helpers.distributed import Pool, on_ranks
from tests.helpers.small_network import stage

SETTINGS = {"precision": "bf16", "sub_group_size": 50}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two processes, and what was in it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, *on_ranks(2, tasks.train_and_save, str(folder), SETTINGS)[0]


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"precision": "bf16"}),
        (2, SETTINGS),
        (2, {"precision": "bf16", "zero_stage": 2}),
        (3, {"precision": "bf16", "sub_group_size": 7, "persistence_threshold": 10_000}),
        (4, {"precision": "bf16", "zero_stage": 1}),
        (4, {"precision": "bf16"}),
    ],
    ids=str,
)
def test_a_run_resumes_exactly_on_any_number_of_processes(saved, world, settings):
    folder, state, _, loss = saved
    trainer, resumed, next_loss, groups = on_ranks(world, tasks.resume, str(folder), settings)[0]
    assert trainer == {"position": [1, 2]}
    assert resumed.keys() == state.keys()
    assert all(torch.equal(resumed[name], state[name]) for name in state)
    assert next_loss == pytest.approx(loss, rel=1e-6)
    assert {group["name"]: group["weight_decay"] for group in groups} == {"decay": 0.1, "no_decay": 0.0}
    assert state["replicated", "seen"].tolist() == [3.0] * 3


def test_a_run_with_muon_resumes_exactly_on_another_number_of_processes_and_not_with_adamw(tmp_path):
    settings = {"optimizer": "muon", "sub_group_size": 200}
    state, _, loss = on_ranks(2, tasks.train_and_save, str(tmp_path), settings)[0]
    assert state["exp_avg", "blocks.1.1.weight"].abs().sum() > 0
    _, resumed, next_loss, groups = on_ranks(3, tasks.resume, str(tmp_path), {"optimizer": "muon"})[0]
    assert all(torch.equal(resumed[name], state[name]) for name in state)
    assert next_loss == pytest.approx(loss, rel=1e-6)
    assert [group["name"] for group in groups] == ["muon", "decay", "no_decay"]
    with pytest.raises(
        AssertionError, match="parameter groups muon, decay, no_decay, the stage has decay, no_decay"
    ):
        on_ranks(1, tasks.resume, str(tmp_path), {})


def test_whole_weights_are_read_without_a_process_group(saved):
    folder, _, (trained, averaged), _ = saved
    for source in (folder.parent, next(folder.glob("step_*"))):
        for which, expected in (("raw", trained), ("0.99", averaged)):
            weights = load_weights(source, which)
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for absent in ("0.5", "emma", "2"):
        with pytest.raises(
            UserError, match=f"no weights `{absent}` there: choose raw, ema, or .*: 0.9, 0.99$"
        ):
            load_weights(folder.parent, absent)
    with pytest.raises(UserError, match="no weights there"):
        load_weights(folder.parent / "nowhere", "raw")


def test_a_checkpoint_of_another_network_is_refused_by_name(saved):
    message = on_ranks(1, tasks.load_other_network, str(saved[0]))[0]
    assert "lacks" in message
    assert "patch_embedding.weight" in message


def test_a_stage_starts_from_another_with_one_llm_more(tmp_path):
    new, refused = on_ranks(2, tasks.start_next_stage, str(tmp_path))[0]
    assert new
    assert all(name.startswith("fusion.") and ".2." in name for name in new)
    assert "lacks fusion." in refused


def test_a_stage_starts_from_another_with_a_new_module_that_the_caller_names():
    new, loss, expected = on_ranks(1, tasks.start_with_a_toy_branch)[0]
    assert new == ["toy.weight", "toy.bias"]
    assert loss == expected


def test_a_full_disk_costs_that_checkpoint_and_no_other(tmp_path):
    good, left, failures, message, newest, afterwards = on_ranks(2, tasks.fill_the_disk, str(tmp_path))[0]
    assert good == left == ["latest", "step_000000001"]
    assert failures == 1
    assert "could not be written" in message
    assert newest.name == "step_000000001"
    assert afterwards.name == "step_000000004"


def crash_and_resume(folder, kills, seed):
    """Kill both ranks `kills` times at random moments; compare the end with that of an uninterrupted run."""
    steps = 40 * (kills + 1)  # at 10 ms a step or more, no kill comes later than 31 steps after the resume
    expected = on_ranks(2, tasks.crashing_run, str(folder / "whole"), steps, 3, timeout=60 + steps)[0]
    killed, moments = folder / "killed", random.Random(seed)
    for _ in range(kills):
        before = names(killed)
        pool = Pool(2)
        pool.send(tasks.crashing_run, (str(killed), steps, 3))
        deadline = time.monotonic() + 60
        while names(killed) == before:  # so that each life gets further than the last
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.random() * 0.25)
        pool.kill()
    losses, total, resumed_from = on_ranks(2, tasks.crashing_run, str(killed), steps, 3, timeout=60 + steps)[
        0
    ]
    assert resumed_from.startswith("step_")
    assert (losses, total) == expected[:2]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path, kills):
    crash_and_resume(tmp_path, kills, seed=kills)


# -- one process, no network: what happens to files
# ------------------------------------------------------------------------


class FakeEngine:
    """As much of an engine as a save looks at."""

    device = torch.device("cpu")

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.stage = stage()
        self.layout = Layout(1, "parameter", [[("a", (3, 2)), ("b", (5,))]], [11])
        self.tensors = {
            kind: [torch.randn(11)] for kind in ("master", "exp_avg", "exp_avg_sq", "ema_0", "ema_1")
        }
        self.replicated = {"seen": torch.arange(3)}
        self.loaded = None

    def state(self):
        return RankState(
            self.layout,
            self.tensors,
            7,
            [{"name": "decay", "weight_decay": 0.1}],
            [0.9, 0.99],
            self.replicated,
        )

    def finish_load(self, step, replicated):
        self.loaded = step, replicated


def names(folder):
    return sorted(path.name for path in folder.glob("step_*"))


def save_steps(checkpoints, steps, wait=True):
    for step in steps:
        checkpoints.save(FakeEngine(step), {"step": step}, step * 10, step, wait)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "rank_00000.safetensors"),
    "a bit of the rest": lambda folder: flip(folder / "replicated.safetensors"),
    "cut": lambda folder: (folder / "rank_00000.safetensors").write_bytes(
        (folder / "rank_00000.safetensors").read_bytes()[:100]
    ),
    "a file": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=3))
    save_steps(checkpoints, [1, 2, 3])
    damage(tmp_path / "step_000000003")
    newest = checkpoints.newest()
    assert newest == tmp_path / "step_000000002"
    assert "step_000000003 is passed over" in caplog.text
    engine = FakeEngine(9)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    assert checkpoints.load(engine, newest) == {"step": 2}
    assert all(
        torch.equal(engine.tensors[kind][0], FakeEngine(2).tensors[kind][0]) for kind in engine.tensors
    )
    assert engine.loaded[0] == 7
    save_steps(checkpoints, [3])  # over the damaged one
    assert names(tmp_path) == ["step_000000003"]
    assert checkpoints.newest() == tmp_path / "step_000000003"


def test_only_the_last_and_every_nth_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_every_samples=45))
    save_steps(
        checkpoints, range(1, 15)
    )  # 10 samples each: 50, 90 and 140 are the first at or past a multiple of 45
    assert names(tmp_path) == [f"step_{step:09d}" for step in (5, 9, 13, 14)]
    assert (tmp_path / "latest").read_text() == "step_000000014"
    resumed = Checkpoints(tmp_path, checkpoints.config)
    resumed.load(FakeEngine(), resumed.newest())
    save_steps(resumed, [15, 16])
    assert names(tmp_path) == [f"step_{step:09d}" for step in (5, 9, 14, 15, 16)]


def test_an_unfinished_save_is_invisible_and_swept_up(tmp_path):
    (tmp_path / ".tmp_step_000000005").mkdir()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.newest() is None
    save_steps(checkpoints, [1], wait=False)
    assert names(tmp_path) == []
    while not names(tmp_path):
        checkpoints.poll()
    assert not list(tmp_path.glob(".tmp*"))
    assert checkpoints.newest() == tmp_path / "step_000000001"


def test_a_save_started_before_training_went_on_holds_the_values_of_its_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    engine = FakeEngine()
    expected = engine.tensors["master"][0].clone()
    losses = [1.0]
    checkpoints.save(engine, {"losses": losses}, 10, 1, wait=False)
    engine.tensors["master"][0].zero_()
    losses.append(2.0)
    checkpoints.close()
    other = FakeEngine(5)
    assert checkpoints.load(other, checkpoints.newest()) == {"losses": [1.0]}
    assert torch.equal(other.tensors["master"][0], expected)


def test_a_process_whose_run_another_job_has_taken_over_commits_nothing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())

    def attempt(job, restart):
        (tmp_path / "attempt.json").write_text(json.dumps(asdict(Attempt(job, restart, "n1", 0.0))))

    attempt("7", 1)
    monkeypatch.setenv("LI_DIT_ATTEMPT", "7.1")
    save_steps(checkpoints, [1])
    for job, restart in (("7", 2), ("8", 1)):
        attempt(job, restart)
        with pytest.raises(UserError, match=f"job {job}.{restart} has taken this run over from 7.1"):
            save_steps(checkpoints, [2])
    assert names(tmp_path / "checkpoints") == ["step_000000001"]
    monkeypatch.delenv("LI_DIT_ATTEMPT")  # started by hand: nothing to compare with
    save_steps(checkpoints, [3])
    assert names(tmp_path / "checkpoints") == ["step_000000001", "step_000000003"]


def test_a_checkpoint_whose_manifest_does_not_name_moments_is_adamws_or_muons(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    save_steps(checkpoints, [1])
    path = tmp_path / "step_000000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh64"]  # earlier versions did not seal it either
    assert manifest["optimizer"].pop("moments") == ["exp_avg", "exp_avg_sq"]
    path.write_text(json.dumps(manifest))
    engine = FakeEngine(9)
    assert checkpoints.load(engine, checkpoints.newest()) == {"step": 1}
    assert torch.equal(engine.tensors["exp_avg"][0], FakeEngine(1).tensors["exp_avg"][0])


def test_other_averages_than_the_stages_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    save_steps(checkpoints, [1])
    engine = FakeEngine()
    engine.state = lambda: SimpleNamespace(**{**vars(FakeEngine().state()), "decays": [0.5]})
    with pytest.raises(UserError, match=r"averages of decay \[0.9, 0.99\]"):
        checkpoints.load(engine, checkpoints.newest())


def test_a_store_gets_the_frozen_weights_too_once(tmp_path, store_uri):
    run, store = tmp_path / "run", open_store(store_uri, create=True)
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(upload=store_uri))
    for frozen, step in ((1.0, 1), (1.0, 2), (2.0, 3)):
        save_base(run, {"layer": torch.full((3,), frozen)}, ["layer"])
        written = {key: store.version(key) for key in store.list("run/base/")}
        save_steps(checkpoints, [step], wait=False)
        checkpoints.wait()
        checkpoints.close()
        keys = sorted(store.list("run/base/"))
        assert keys == ["run/base/00000.safetensors", "run/base/base.json"]
        assert [store.read(key) for key in keys] == [
            (run / "base" / key.split("/")[-1]).read_bytes() for key in keys
        ]
        if step == 2:
            assert {key: store.version(key) for key in keys} == written


def test_a_store_gets_a_copy_whose_manifest_comes_last(tmp_path, store_uri):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(upload=store_uri))
    save_steps(checkpoints, [1], wait=False)
    checkpoints.close()
    store = open_store(store_uri)
    keys = list(store.list("run/checkpoints/step_000000001"))
    assert [key.split("/")[-1] for key in keys] == [
        "manifest.json",
        "rank_00000.safetensors",
        "replicated.safetensors",
    ]
    local = tmp_path / "run" / "checkpoints" / "step_000000001"
    for key in keys:
        assert store.read(key) == (local / key.split("/")[-1]).read_bytes()
    assert json.loads(store.read(keys[0]))["step"] == 1
