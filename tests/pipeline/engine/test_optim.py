"""Parameter groups hold every trained parameter once; the learning rate does what the settings say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.adapter import is_adapter
from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.common.errors import UserError
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT
from pipeline.engine.muon import MUON, orthogonalize
from pipeline.engine.optim import learning_rate, optimizer_settings, parameter_groups
from pipeline.stage.config import OptimConfig
from tests.helpers.networks import normal

SCHEDULES = st.builds(
    OptimConfig,
    lr=st.floats(1e-6, 1),
    warmup_samples=st.integers(0, 1000),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    final_lr=st.floats(0, 1),
)


def network():
    return LIDiT(
        DiTConfig(depth=1, width=32, heads=4, channels=4), FusionConfig(families=["a", "b"]), [8, 12]
    )


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay():
    model = network()
    model.patch_embedding.weight.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(
        {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or "modulation" in name or "gate" in name
            assert decay[name] == (0.0 if spared else 0.1), name
    assert decay["blocks.0.mlp.up.weight"] == 0.1


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


@given(SCHEDULES, st.integers(2000, 5000))
def test_learning_rate_warms_up_stays_in_bounds_and_ends_where_it_should(config, total):
    rates = [learning_rate(config, samples, total) for samples in range(0, total + 1, 10)]
    warm = [
        rate
        for rate, samples in zip(rates, range(0, total + 1, 10), strict=True)
        if samples < config.warmup_samples
    ]
    assert warm == sorted(warm)
    assert all(0 < rate <= config.lr * (1 + 1e-9) for rate in warm)
    after = rates[len(warm) :]
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(config.lr, rel=0.02)
    final = 1.0 if config.schedule == "constant" else config.final_lr
    assert learning_rate(config, total, total) == pytest.approx(config.lr * final, abs=1e-12)
    assert learning_rate(config, total + 1000, total) == pytest.approx(config.lr * final, abs=1e-12)


def test_muon_leaves_the_matrices_of_adapters_to_adamw():
    model = attach_adapters(network(), UsersConfig(2, 3, 8, 2, 2, 4), LoRAConfig(2))
    settings = optimizer_settings(OptimConfig(name="muon"))
    groups = {name: settings.group(name, value.shape) for name, value in model.named_parameters()}
    assert groups["blocks.0.mlp.up.weight"] == MUON
    assert not [name for name, group in groups.items() if group == MUON and is_adapter(name)]
    assert {"blocks.0.mlp.up.lora_A.weight", "adapters.users.blocks.0.up.weight"} < groups.keys()


@pytest.mark.parametrize(("iterations", "smallest"), [(5, 0.0015), (3, 0.017)])
def test_singular_values_above_a_bound_are_brought_near_one(iterations, smallest):
    left, _ = torch.linalg.qr(normal(24, 8, seed=0))
    right, _ = torch.linalg.qr(normal(8, 8, seed=1))
    # The largest ones make the Frobenius norm, 2, of which the bound is a share.
    values = torch.tensor([1.4, 1.4, 0.25, 0.1, *[2.2 * smallest] * 3, smallest])
    values = values * (2.0 / values.norm())
    matrix = (left @ values.diag().double() @ right).float()

    for turned, rows in ((matrix, 24), (matrix.T, 8)):
        found = torch.linalg.svdvals(orthogonalize(turned, iterations).float())
        assert orthogonalize(turned, iterations).shape[0] == rows
        assert 0.6 < found[6] <= found[0] < 1.25
        assert found[7] < 0.6


def test_iterations_are_set_by_the_stage_within_a_range():
    assert optimizer_settings(OptimConfig(name="muon")).iterations == 5
    assert optimizer_settings(OptimConfig(name="muon", settings={"iterations": 3})).iterations == 3
    with pytest.raises(UserError, match=r"optim.settings: iterations=0: set a number from 1 to 20"):
        optimizer_settings(OptimConfig(name="muon", settings={"iterations": 0}))
