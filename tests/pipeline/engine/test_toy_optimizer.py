"""An optimizer registered outside the package is trained, saved, resumed and estimated like the package's."""

import pytest
import torch

from model.common.errors import UserError
from model.config import DiTConfig
from pipeline.engine.optim import optimizer_settings
from pipeline.operations.planning import count_moments, state_memory
from pipeline.stage.config import OptimConfig
from tests.helpers import checkpoint_tasks, toy_optimizer
from tests.helpers.distributed import on_ranks
from tests.helpers.small_network import stage

SETTINGS = {"optimizer": toy_optimizer.NAME, "sub_group_size": 200}


@pytest.mark.parametrize("zero_stage", [3, 2])
def test_it_trains_on_two_ranks_as_on_one(zero_stage):
    settings = {"optimizer": toy_optimizer.NAME, "zero_stage": zero_stage}
    losses, worst = on_ranks(2, toy_optimizer.train_like_ddp, settings, 6)[0]
    for loss, expected in losses:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert losses[-1][0] != losses[0][0]
    assert worst < 1e-6


def test_it_resumes_exactly_on_any_number_of_processes_and_not_with_another_optimizer(tmp_path):
    state, _, loss = on_ranks(2, toy_optimizer.train_and_save, str(tmp_path), SETTINGS)[0]
    kinds = {key[0] for key in state if "blocks.1.1.weight" in key}
    assert kinds == {"master", "momentum_buffer", "ema_0", "ema_1"}
    assert state["momentum_buffer", "blocks.1.1.weight"].abs().sum() > 0

    for world in (2, 3):
        _, resumed, next_loss, _ = on_ranks(world, toy_optimizer.resume, str(tmp_path), SETTINGS)[0]
        assert resumed.keys() == state.keys()
        assert all(torch.equal(resumed[name], state[name]) for name in state)
        assert next_loss == (loss if world == 2 else pytest.approx(loss, rel=1e-6))

    message = "was trained with moments momentum_buffer, the stage has exp_avg, exp_avg_sq: set optim.name"
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, checkpoint_tasks.resume, str(tmp_path), {})


def test_its_memory_is_estimated():
    parameters, held = on_ranks(
        2, toy_optimizer.held_bytes, {"optimizer": toy_optimizer.NAME, "precision": "bf16"}
    )[0]
    config = stage(optimizer=toy_optimizer.NAME, precision="bf16")
    dit = DiTConfig(depth=3, width=64, heads=4, channels=4)
    planned = state_memory(config, parameters, 2, count_moments(config, dit, (24, 16)))
    assert planned["moments"] == pytest.approx(held["moments"], rel=0.02)
    assert planned["moments"] == pytest.approx(planned["masters"], rel=0.02)


def test_its_settings_come_from_the_stage():
    config = OptimConfig(name=toy_optimizer.NAME, momentum=0.8, settings={"nesterov": False})
    assert optimizer_settings(config) == toy_optimizer.ToySettings(momentum=0.8, nesterov=False)
    assert optimizer_settings(OptimConfig(name=toy_optimizer.NAME)) == toy_optimizer.ToySettings(
        0.95, nesterov=True
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("toy_sgb", {}, "optim.name=toy_sgb is unknown: did you mean `toy_sgd`"),
        (
            toy_optimizer.NAME,
            {"nestorov": True},
            "optim.settings.nestorov: .* whose own settings are: nesterov",
        ),
        (toy_optimizer.NAME, {"nesterov": "often"}, "optim.settings: nesterov: .*often"),
        (
            toy_optimizer.NAME,
            {"momentum": 0.5},
            "optim.settings.momentum: toy_sgd reads it from optim.momentum",
        ),
        ("adamw", {"nesterov": True}, "optim.settings.nesterov: .* whose own settings are: none"),
    ],
)
def test_settings_that_it_does_not_have_are_refused_by_name(name, settings, message):
    with pytest.raises(UserError, match=message):
        optimizer_settings(OptimConfig(name=name, settings=settings))
