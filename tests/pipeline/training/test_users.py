"""A stage with users: the base stays, absent rows stay, and nothing depends on the number of ranks."""

import json

import pytest
import torch

from model.adapter import is_adapter
from model.adapters import LoRAConfig, UsersConfig
from model.common.errors import UserError
from pipeline.checkpoint.base import open_base
from pipeline.checkpoint.checkpoints import load_weights
from pipeline.forget_user import forget_user
from pipeline.runtime.stopping import EXIT_AGAIN
from pipeline.stage.config import StageConfig
from pipeline.stage.forgotten import add_forgotten, read_forgotten
from pipeline.training.users import dispersion
from tests.helpers import fake_snapshot, trainer_tasks, user_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.user_tasks import USERS

BUCKETS = {"32x32": [20, 20, 9, 16], "32x64": [24, 11]}
TABLE = "adapters.users.table.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fake_snapshot.make(folder / "store", BUCKETS, folder, users=USERS)
    return str(folder / "store")


@pytest.fixture(scope="module")
def base(store, tmp_path_factory):
    """A short run of the whole network."""
    runs = tmp_path_factory.mktemp("base")
    on_ranks(2, trainer_tasks.train, store, str(runs), None, {"samples": 8 * 4})
    return runs / "small"


@pytest.fixture(scope="module")
def straight(store, base, tmp_path_factory):
    runs = tmp_path_factory.mktemp("straight")
    return runs / "small", on_ranks(2, user_tasks.train, store, str(runs), {"start_from": str(base)})[0]


def numbers(reports):
    names = ("loss", "grad_norm", "dispersion", "user_shift")
    return [[report[name] for name in names] for report in reports]


def test_only_the_adapter_is_trained_and_checkpoints_hold_it_alone(base, straight):
    run, (code, reports, trained, replicated) = straight
    assert code == 0
    assert trained
    assert all(is_adapter(name) for name in trained)
    assert replicated == []
    started, ended = load_weights(base, "ema"), load_weights(run, "raw")
    assert set(ended) == set(started) | set(trained)
    assert all(torch.equal(ended[name], started[name]) for name in started)
    manifest = json.loads(next((run / "checkpoints").glob("step_*/manifest.json")).read_text())
    names = {name for group in manifest["layout"]["groups"] for name, _ in group}
    assert names == set(trained)
    assert reports[-1]["user_shift"] > reports[0]["user_shift"] == 0


def test_the_first_gradients_of_the_adapter_are_as_large_as_the_next_ones(straight):
    """The second step is the first whose gradients pass the norms below the layers that start at zero."""
    norms = [report["grad_norm"] for report in straight[1][1]]
    assert 0 < norms[1] < 10 * norms[2]


@pytest.fixture(scope="module")
def in_fp32(store, base, tmp_path_factory):
    """Settings and reports of a run in fp32 on two ranks, whose batches divide among three."""
    settings = {"start_from": str(base), "engine__precision": "fp32", "global_batch": 12, "samples": 12 * 4}
    runs = tmp_path_factory.mktemp("fp32")
    return settings, on_ranks(2, user_tasks.train, store, str(runs), settings)[0]


@pytest.mark.parametrize("then", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_saved_on_two_ranks_goes_on_on_another_number(store, in_fp32, tmp_path, then):
    settings, plain = dict(in_fp32[0]), in_fp32[1]
    stopped = on_ranks(2, user_tasks.train, store, str(tmp_path / "moved"), settings, 2)[0]
    assert stopped[0] == EXIT_AGAIN
    # The base is the run's own: what it was started from may be gone.
    settings["start_from"] = "gone"
    moved = on_ranks(then, user_tasks.train, store, str(tmp_path / "moved"), settings)[0]
    torch.testing.assert_close(
        torch.tensor(numbers(moved[1])), torch.tensor(numbers(plain[1])), rtol=1e-4, atol=1e-6
    )


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(store, base, straight, tmp_path):
    on_ranks(2, user_tasks.train, store, str(tmp_path), {"start_from": str(base)}, 3)
    again = on_ranks(2, user_tasks.train, store, str(tmp_path), {"start_from": str(base)})[0]
    assert numbers(again[1]) == numbers(straight[1][1])


@pytest.mark.parametrize(("world", "engine"), [(2, {}), (1, {"engine__zero_stage": 2})])
def test_rows_that_a_batch_does_not_hold_do_not_move(store, base, tmp_path, world, engine):
    settings = {"start_from": str(base), **engine}
    found = on_ranks(world, user_tasks.table_after_each_step, store, str(tmp_path), settings, 5)[0]
    moved = set()
    for users, changed in found:
        for kind, rows in changed.items():
            assert set(rows) <= set(users), kind
        moved |= set(changed["master"])
    # Not in the first step, in which the last layers are zero; then all users but the one of no sample.
    assert not found[0][1]["master"]
    assert moved == set(range(USERS))
    # Some step lacked a user that had moved before, whose momentum would have moved it.
    assert any(len(set(users) - {-1}) < USERS for users, _ in found[2:])


def test_the_table_has_a_learning_rate_of_its_own(store, base, tmp_path):
    settings = {"start_from": str(base), "users__table_lr": 0.0}
    found = on_ranks(1, user_tasks.table_after_each_step, store, str(tmp_path), settings, 3)[0]
    assert not any(changed["master"] for _, changed in found)
    # Its moments move, and so it has gradients.
    assert found[-1][1]["exp_avg"]


def test_without_users_the_losses_are_those_of_the_base(store, base, tmp_path):
    """Drop 1 leaves only nobody: the loss is the frozen network's, step by step, and nothing moves."""
    settings = {"start_from": str(base), "users__drop": 1.0, "users__dispersion": 0.0, "samples": 8 * 2}
    _, reports, _, _ = on_ranks(2, user_tasks.train, store, str(tmp_path), settings)[0]
    frozen = {"start_from": str(base), "optim__lr": 0.0, "samples": 8 * 2}
    _, expected = on_ranks(2, trainer_tasks.train, store, str(tmp_path / "frozen"), None, frozen)[0]
    assert [report["loss"] for report in reports] == [report["loss"] for report in expected]
    assert all(report["grad_norm"] == 0 for report in reports)


def test_a_next_stage_goes_on_with_the_users_of_the_last(store, straight, tmp_path):
    settings = {"start_from": str(straight[0]), "start_weights": "raw", "optim__lr": 0.0, "samples": 8 * 2}
    on_ranks(1, user_tasks.train, store, str(tmp_path), settings)
    before, after = load_weights(straight[0], "raw"), load_weights(tmp_path / "small", "raw")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("users", [0, USERS])
def test_lora_trains_beside_the_users_and_alone(store, base, tmp_path, users):
    settings = {"start_from": str(base), "lora__rank": 2, "samples": 8 * 2, "users__count": users}
    code, _, trained, _ = on_ranks(2, user_tasks.train, store, str(tmp_path), settings)[0]
    assert code == 0
    assert any("lora_A" in name for name in trained)
    ended = load_weights(tmp_path / "small", "raw")
    assert all(ended[name].any() for name in trained if "lora_B" in name)


def test_a_deleted_user_is_not_learned_again(store, base, tmp_path):
    """Neither when the run goes on, nor by a stage that starts from it; their snapshot still has the user."""
    settings = {"start_from": str(base), "samples": 8 * 12}
    on_ranks(1, user_tasks.train, store, str(tmp_path), settings, 3)
    run = tmp_path / "small"
    before = load_weights(run, "raw")[TABLE]
    with pytest.raises(UserError, match=r"no user 7, it has 0 to 6"):
        forget_user(run, 7)
    assert read_forgotten(run) == set()
    assert forget_user(run, 2)
    on_ranks(1, user_tasks.train, store, str(tmp_path), settings)
    for kind in ("raw", "ema", "0.5"):
        table = load_weights(run, kind)[TABLE]
        assert table[:USERS].any(dim=1).tolist() == [True, True, False, True, True, True]
    assert not torch.equal(load_weights(run, "raw")[TABLE][3], before[3])

    # By its newest checkpoint as well as by its folder.
    newest = max((run / "checkpoints").glob("step_*"))
    settings = {"start_from": str(newest), "start_weights": "raw"}
    on_ranks(2, user_tasks.train, store, str(tmp_path / "next"), settings)
    table = load_weights(tmp_path / "next" / "small", "raw")[TABLE]
    assert not table[2].any()
    assert read_forgotten(tmp_path / "next" / "small") == {2}


def test_a_damaged_record_of_deleted_users_is_named(tmp_path):
    add_forgotten(tmp_path, [4])
    add_forgotten(tmp_path, [2, 4])
    assert read_forgotten(tmp_path) == {2, 4}
    record = tmp_path / "forgotten.json"
    record.write_text(record.read_text().replace("4", "3"))
    with pytest.raises(UserError, match=r"forgotten\.json: damaged"):
        read_forgotten(tmp_path)


def test_a_damaged_base_is_named(straight, tmp_path):
    run = tmp_path / "run"
    for path in straight[0].rglob("*"):
        if path.is_file():
            target = run / path.relative_to(straight[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    file = next((run / "base").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"base/00000\.safetensors: missing or not what was written"):
        load_weights(run, "raw")
    (run / "base" / "base.json").write_text("{}")
    with pytest.raises(UserError, match=r"base\.json"):
        open_base(run)


def test_batches_have_the_users_of_their_samples(store, tmp_path):
    shares = on_ranks(2, user_tasks.read_users, store, str(tmp_path), 0.0)
    found = dict(pair for samples, _ in shares for pair in samples)
    assert len(found) > 60
    assert all(user == fake_snapshot.user_of(id, USERS) for id, user in found.items())
    shares = on_ranks(2, user_tasks.read_users, store, str(tmp_path), 0.5)
    dropped = {id: user for samples, _ in shares for id, user in samples if user != found[id]}
    assert set(dropped.values()) == {-1}
    assert 0.25 < len(dropped) / len(found) < 0.6
    assert all(user == fake_snapshot.user_of(id, USERS) for _, held_out in shares for id, user in held_out)


@pytest.mark.parametrize("seed", [0, 1])
def test_dispersion_on_two_ranks_is_that_on_one(seed):
    ((loss, gradient),) = on_ranks(1, user_tasks.dispersed, seed, 12, 5)
    for other, others_gradient in on_ranks(2, user_tasks.dispersed, seed, 12, 5):
        assert other == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(others_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3


def test_dispersion_of_two_users_is_minus_their_distance():
    one, other = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounded = [row / (1 + row.square().mean()).sqrt() for row in (one, other)]
    distance = (bounded[0] - bounded[1]).square().mean().sqrt()
    # Of a user's rows the first counts, and nobody's does not.
    rows, ids = torch.stack([one, torch.ones(7), other, one]), torch.tensor([3, -1, 0, 3])
    assert dispersion(rows, ids).item() == pytest.approx(-distance.item(), rel=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert dispersion(rows[order], ids[order]).item() == pytest.approx(-distance.item(), rel=1e-12)


def test_dispersion_is_bounded_and_its_gradient_finite_where_users_are_alike():
    far = 1e6 * torch.eye(5)
    assert -2 <= dispersion(far, torch.arange(5)).item() < -1
    alike = torch.zeros(4, 5, requires_grad=True)
    dispersion(alike, torch.arange(4)).backward()
    assert torch.equal(alike.grad, torch.zeros(4, 5))
    single = torch.ones(2, 5, requires_grad=True)
    dispersion(single, torch.tensor([1, 1])).backward()
    assert torch.equal(single.grad, torch.zeros(2, 5))


def test_a_table_that_does_not_fit_the_data_is_refused_by_name(store, base, tmp_path):
    with pytest.raises(AssertionError, match=r"users\.count=2 is too small.*set at least 6"):
        on_ranks(1, user_tasks.train, store, str(tmp_path), {"start_from": str(base), "users__count": 2})
    fake_snapshot.make(tmp_path / "other", {"32x32": [8]}, tmp_path)
    with pytest.raises(AssertionError, match="has no users"):
        on_ranks(1, user_tasks.train, str(tmp_path / "other"), str(tmp_path), {"start_from": str(base)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "base", "start_from": "x"}, "leaves nothing to train"),
        ({"users": {"count": 3}}, r"users\.count needs freeze=base"),
        ({"freeze": "base", "lora": {"rank": 3}}, "needs start_from"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    kinds = {"users": UsersConfig, "lora": LoRAConfig}
    made = {name: kinds[name](**value) if name in kinds else value for name, value in settings.items()}
    with pytest.raises(UserError, match=message):
        StageConfig(**made)
