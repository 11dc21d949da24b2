"""The engine on two gloo processes against plain torch, and its refusals."""

import itertools
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model.common.errors import UserError
from pipeline.engine.compile import compile_regions
from pipeline.engine.master_weights import MasterWeights
from pipeline.engine.optim import optimizer_settings
from pipeline.stage.config import OptimConfig
from tests.helpers import engine_tasks as rank_tasks
from tests.helpers import stream_tasks
from tests.helpers.distributed import on_ranks
from tests.helpers.small_network import stage

EXACT = {
    "zero3": {},
    "zero3 micro-batches, many sub-groups, all persistent": {
        "micro_batch": 2,
        "sub_group_size": 20,
        "persistence_threshold": 10_000,
    },
    "zero3 with one reduction": {"micro_batch": 2, "reduce_once": True, "sub_group_size": 20},
    "zero2": {"zero_stage": 2, "micro_batch": 3},
    "zero1": {"zero_stage": 1},
}


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_fp32_training_equals_plain_torch_ddp_and_the_average_its_gathered_reference(settings):
    losses, worst = on_ranks(2, rank_tasks.train_like_ddp, settings, 6)[0]
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=1e-5)
    assert losses[-1][0] != losses[0][0]
    assert worst < 1e-6


@pytest.mark.parametrize(
    ("world", "settings"), [(1, {}), (2, {}), (3, {"sub_group_size": 200, "micro_batch": 2})], ids=str
)
def test_muon_on_shards_is_torchs_on_whole_matrices_with_the_gradients_clipped(world, settings):
    losses, worst = on_ranks(world, rank_tasks.train_like_ddp, {"optimizer": "muon", **settings}, 6)[0]
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=2e-3)  # both orthogonalise in bf16
    assert abs(losses[-1][0] / losses[0][0] - 1) > 0.05
    assert worst < 1e-6


@pytest.mark.parametrize("stage_number", [1, 2, 3])
def test_bf16_training_follows_fp32_over_fp32_masters(stage_number):
    losses, worst = on_ranks(
        2, rank_tasks.train_like_ddp, {"precision": "bf16", "zero_stage": stage_number}, 6
    )[0]
    for ours, expected in losses:
        assert ours == pytest.approx(expected, rel=0.02)
    assert worst < 1e-6


USED = {
    6: [[True], [False], [True], [False], None, [False]],
    3: [
        [True, True],
        [False, False],
        [False, True],
        [True, False],
        [False, False],
        None,
        [False, True],
        [False, False],
    ],
    2: [
        [True, True, True],
        [False, True, False],
        [False, False, False],
        [True, False, False],
        [False, False, True],
    ],
}
"""Samples of a micro-batch -> whether the block is used, by step and micro-step; None = used, and the step is
not finite."""


# The quick suite has every stage, precision and number of micro-steps; the slow one all their combinations.
QUICK = {(3, "fp32", 6), (3, "bf16", 3), (3, "bf16", 2), (2, "bf16", 3), (1, "fp32", 2)}
ONCE = {"zero_stage": 3, "precision": "bf16", "micro_batch": 3, "reduce_once": True}


@pytest.mark.parametrize(
    ("zero_stage", "precision", "micro_batch"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product((1, 2, 3), ("fp32", "bf16"), USED)
    ],
)
def test_a_block_that_a_step_does_not_use_has_no_gradient_in_it(zero_stage, precision, micro_batch):
    settings = {"zero_stage": zero_stage, "precision": precision, "micro_batch": micro_batch}
    check_unused(settings)


def test_a_block_that_only_the_first_micro_step_uses_is_in_the_one_reduction():
    check_unused(ONCE)


def check_unused(settings):
    """Train by `USED`, and compare each step with plain torch."""
    tolerance = 1e-4 if settings["precision"] == "fp32" else 0.1
    schedule = USED[settings["micro_batch"]]
    results = on_ranks(2, rank_tasks.skip_a_block, settings, schedule)[0]
    for used, (change, difference, norm, plain_norm) in zip(schedule, results, strict=True):
        if used is None or not any(used):
            assert change == 0
        else:
            assert change > 0
            assert difference <= tolerance * change
        assert norm == pytest.approx(plain_norm, rel=tolerance) or used is None


def test_a_leaf_module_that_a_step_does_not_use_stays():
    used, skipped, used_again = on_ranks(2, rank_tasks.skip_a_leaf)[0]
    assert used > 0
    assert skipped == 0
    assert used_again > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16", "persistence_threshold": 0, "sub_group_size": 20},
        {"precision": "bf16", "persistence_threshold": 10_000},
        {"precision": "bf16", "zero_stage": 1},
        {"zero_stage": 2},
    ],
    ids=str,
)
def test_swapping_the_average_and_skipping_a_step_leave_no_trace(settings):
    on_ranks(2, rank_tasks.swap_and_skip, settings)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_start_as_exactly_the_plain_network(precision):
    assert all(on_ranks(2, rank_tasks.fresh_masters_equal_plain, precision))


def test_no_rank_ever_holds_the_network_while_it_is_built():
    for at_once, held, whole in on_ranks(2, rank_tasks.whole_while_building, {}):
        assert at_once == 0
        assert held == pytest.approx(whole / 2, rel=0.01)
    for at_once, _, whole in on_ranks(2, rank_tasks.whole_while_building, {"zero_stage": 2}):
        assert at_once == whole  # so it would have been seen


def test_masters_that_are_not_fp32_end_the_start():
    network = nn.Linear(2, 2)
    master = torch.zeros(6, dtype=torch.bfloat16)
    adam = torch.optim.AdamW([master])
    zero = SimpleNamespace(
        optimizer=adam, fp16_groups=[list(network.parameters())], fp32_partitioned_groups_flat=[master],
        fp16_partitioned_groups_flat=[master], sub_group_to_group_id={0: 0},
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"master weights are \{torch.bfloat16\}, not fp32"):
        MasterWeights(zero, network, optimizer_settings(OptimConfig()), 3, 0, 1)


def test_checkpointed_blocks_train_alike_under_zero3():
    none, *others = (on_ranks(2, rank_tasks.checkpointed_losses, every)[0] for every in (0, 1, 2))
    assert none[0] != none[-1]
    assert others == [none, none]


def test_each_kind_of_compiled_block_is_one_graph_without_breaks():
    """Blocks of the DiT, of the token refiners, and branches of the collaborative refiner."""
    graphs, breaks, losses = on_ranks(2, rank_tasks.compiled_blocks)[0]
    assert (graphs, breaks) == (3, 0)
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


def test_a_rank_with_fewer_samples_than_a_micro_batch_trains_all_at_once():
    assert on_ranks(2, rank_tasks.micro_batches, {"micro_batch": 16}) == [(1, 6)] * 2
    assert on_ranks(2, rank_tasks.micro_batches, {"micro_batch": 3}) == [(2, 3)] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_second_copy_of_the_weights_in_each_node_changes_no_number(precision):
    one, two = (
        on_ranks(
            2, stream_tasks.losses_with, {"precision": precision, "hpz": size, "persistence_threshold": 0}
        )
        for size in (1, 2)
    )
    assert one == two
    assert all("engine.hpz=3" in message for message in on_ranks(2, rank_tasks.refusal, stage(hpz=3)))


def test_attention_kernels_are_those_of_the_setting():
    by_name = [on_ranks(1, stream_tasks.attention_kernels, name)[0] for name in ("auto", "cudnn", "flash")]
    assert by_name == [(True, True), (False, True), (True, False)]
    assert on_ranks(1, stream_tasks.attention_kernels, "efficient") == [(False, False)]
    on_ranks(1, stream_tasks.attention_kernels, "auto")


def test_a_failing_rank_ends_its_call_with_its_trace():
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*on purpose"):
        on_ranks(2, rank_tasks.fail_on_rank_one)


@pytest.mark.parametrize(("missing", "named"), [("compiler", "g\\+\\+"), ("headers", "python3-dev")])
def test_a_machine_that_cannot_compile_is_told_what_to_install(monkeypatch, missing, named):
    monkeypatch.delenv("CXX", raising=False)
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nonexistent")
    with pytest.raises(UserError, match=named):
        compile_regions([])


def test_settings_that_cannot_be_met_are_refused():
    assert all("micro_batch" in message for message in on_ranks(1, rank_tasks.refusal, stage(micro_batch=5)))
    refused = on_ranks(1, rank_tasks.refusal, stage(optimizer="muon", zero_stage=2))
    assert all("optim.name=muon needs engine.zero_stage=3" in message for message in refused)
    refused = on_ranks(1, rank_tasks.refusal, stage(reduce_once=True, zero_stage=2))
    assert all("engine.reduce_once needs engine.zero_stage=3" in message for message in refused)
    kept = stage()
    kept.model.activation_memory_budget = 0.7
    ragged = stage(ragged_text=True)
    ragged.users.count = 2
    assert all(
        "adapter of users reads padded" in message for message in on_ranks(1, rank_tasks.refusal, ragged)
    )
    assert all("needs model.compile=true" in message for message in on_ranks(1, rank_tasks.refusal, kept))
    spiking = stage(zero_stage=2)
    spiking.optim.spike = 5.0
    assert all("optim.spike" in message for message in on_ranks(1, rank_tasks.refusal, spiking))
