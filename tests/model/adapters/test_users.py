"""The adapter of users: nothing at its start, nothing for nobody, and only the user's row for a user."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.adapter import adapter_names, freeze_base, is_adapter
from model.adapters import LoRAConfig, UsersConfig, attach_adapters
from model.adapters.users import mixed_tokens
from model.common.errors import UserError
from model.condition import Condition, Levels, Users
from model.config import FusionConfig
from model.dit import LIDiT
from tests.helpers.networks import SMALL, WIDTHS, few, random_inputs, randomise

COUNT = 5
CONFIG = UsersConfig(count=COUNT, tokens=3, width=8, heads=2, blocks=2, rank=4)


def with_users(trained=True, checkpoint_every=0, sizes=SMALL, **settings):
    """A random frozen network with users, whose adapter has random weights if `trained`; and it without."""
    torch.manual_seed(0)
    network = LIDiT(sizes, FusionConfig(), WIDTHS[:2], checkpoint_every)
    randomise(network)
    plain = LIDiT(sizes, FusionConfig(), WIDTHS[:2], checkpoint_every).double().eval()
    plain.load_state_dict(network.state_dict())
    attach_adapters(network, replace(CONFIG, **settings), LoRAConfig())
    network.double().eval()
    if trained:
        randomise(network.adapters, seed=1)
    return network, plain


def condition(ids=None, tokens=None, probes=None, lengths=(4, 2, 3)):
    latents, timesteps, texts = random_inputs(lengths=lengths)
    users = None if ids is None else Users(torch.tensor(ids), tokens, probes)
    return latents, Condition(timesteps, texts, users=users)


@few
@given(ids=st.lists(st.integers(-1, COUNT - 1), min_size=3, max_size=3))
def test_a_fresh_adapter_leaves_every_users_prediction_as_it_was_bit_for_bit(ids):
    network, plain = with_users(trained=False)
    latents, given_ids = condition(ids)
    assert torch.equal(network(latents, given_ids), plain(latents, replace(given_ids, users=None)))


@pytest.mark.parametrize("only", ["all", "shared", "distinct", "pooled"])
def test_nobody_is_the_frozen_network_and_each_user_is_not(only):
    parts = {name: only in ("all", name) for name in ("shared", "distinct", "pooled")}
    network, plain = with_users(**parts)
    latents, some = condition([2, -1, 4])
    base = plain(latents, replace(some, users=None))
    ours = network(latents, some)
    assert torch.equal(ours[1], base[1])
    assert (ours - base).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-3
    assert torch.equal(network(latents, replace(some, users=None)), base)


def test_nobody_is_the_frozen_network_where_patches_have_levels():
    network, plain = with_users(sizes=replace(SMALL, time_levels=2))
    latents, given_users = condition([-1, 1, -1])
    patches = latents.shape[2] * latents.shape[3] // 4
    levels = Levels(torch.arange(3 * patches).view(3, -1) % 2, torch.rand(3))
    times = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    leveled = replace(given_users, timesteps=times, levels=levels)
    ours, base = network(latents, leveled), plain(latents, replace(leveled, users=None))
    assert torch.equal(ours[[0, 2]], base[[0, 2]])
    assert not torch.equal(ours[1], base[1])


@few
@given(order=st.permutations(range(COUNT)))
def test_rows_and_ids_may_be_swapped_together(order):
    network, _ = with_users()
    latents, some = condition([0, 3, 4])
    before = network(latents, some)
    table = network.adapters["users"].table.weight
    with torch.no_grad():
        table.copy_(table[torch.tensor(order)].clone())
    moved = torch.tensor([order.index(user) for user in (0, 3, 4)])
    assert torch.equal(network(latents, replace(some, users=Users(moved))), before)


@few
@given(user=st.integers(0, COUNT - 1))
def test_one_hot_coefficients_are_the_user(user):
    network, _ = with_users()
    table = network.adapters["users"].table.weight
    tokens = mixed_tokens(table, torch.eye(COUNT, dtype=torch.float64)[[user] * 3], CONFIG.tokens)
    latents, named = condition([user] * 3)
    _, mixed = condition([0] * 3, tokens)
    assert torch.equal(network(latents, mixed), network(latents, named))


def test_only_rows_of_the_batch_and_the_adapter_get_gradients():
    network, _ = with_users()
    freeze_base(network)
    latents, some = condition([2, -1, 4])
    network(latents, some).square().mean().backward()
    rows = network.adapters["users"].table.weight.grad.abs().amax(1)
    assert (rows > 0).tolist() == [False, False, True, False, True]
    assert [name for name, parameter in network.named_parameters() if parameter.grad is not None] == list(
        adapter_names(network)
    )
    assert all(is_adapter(name) for name in adapter_names(network))


def test_padding_and_other_samples_do_not_change_a_users_prediction():
    network, _ = with_users()
    latents, many = condition([2, 0, 4])
    alone = network(latents[:1], many.row(0))
    assert torch.allclose(network(latents, many)[:1], alone, rtol=1e-10, atol=1e-12)


def test_probes_are_the_shifts_of_their_users_alone():
    network, _ = with_users()
    latents, some = condition([2, -1, 4], probes=torch.tensor([4, -1, 2, 4]))
    network(latents, some)
    answers = some.users.answers
    assert answers.shape == (4, SMALL.width * (2 + SMALL.depth))
    assert torch.equal(answers[0], answers[3])
    assert not answers[1].any()
    assert not torch.equal(answers[0], answers[2])


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for every in (0, 1):
        network, _ = with_users(checkpoint_every=every)
        network.train()
        latents, some = condition([2, -1, 4])
        network(latents, some).square().mean().backward()
        gradients.append(network.adapters["users"].table.weight.grad)
    assert torch.equal(*gradients)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"users\.width=8 is not a multiple of users\.heads=3"):
        with_users(heads=3)
    with pytest.raises(UserError, match="all false"):
        with_users(shared=False, distinct=False, pooled=False)
