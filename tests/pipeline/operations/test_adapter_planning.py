"""The estimate of a frozen network: state for its adapters alone, and what the table of users takes."""

import pytest

from model.common.errors import UserError
from pipeline.estimate import adapter_lines
from pipeline.operations.planning import Setup, check_memory, make_plan, most_users
from pipeline.stage.config import load_stage


def test_a_frozen_network_has_state_for_its_adapters_alone_and_says_what_the_table_takes():
    stage = load_stage("li_dit_1b_256", ["global_batch=64"])
    plain = make_plan(stage, Setup(gpus=8))
    users = ["freeze=base", "start_from=runs/base", "users.count=1000"]
    frozen = load_stage("li_dit_1b_256", ["global_batch=64", *users])
    plan = make_plan(frozen, Setup(gpus=8))

    trained = plan.parameters["adapters"]
    table = 1000 * 30 * 1024
    assert table < trained < table + 100e6
    assert plan.memory["masters"] == pytest.approx(4 * trained / 8)
    assert plan.memory["moments"] == pytest.approx(2 * 4 * trained / 8)
    assert plan.memory["table of users"] == 2 * 2 * table  # bf16, and its gradient
    assert plan.memory["weights"] == pytest.approx(plain.memory["weights"] + 2 * trained / 8)
    assert plan.checkpoint_bytes < plain.checkpoint_bytes / 10

    assert plan.memory["rows of a step"] == (table + 24 * 64 * 30 * 1024) / 8
    lines = list(adapter_lines(frozen, plan.parameters, [Setup(gpus=8), Setup(gpus=64)]))
    assert "1,000 users: 61 kB each, 0.06 GB" in lines[1]
    assert not list(adapter_lines(stage, plain.parameters, [Setup(gpus=8)]))


def test_the_users_that_fit_are_printed_and_more_are_refused_by_name():
    settings = ["global_batch=64", "freeze=base", "start_from=runs/base", "engine.reduce_once=true"]

    def stage(count):
        return load_stage("li_dit_1b_256", [*settings, f"users.count={count}"])

    setup = Setup(gpus=8, height=stage(1).sample.height, width=stage(1).sample.width)
    most = most_users(stage(1000), setup, 80e9)
    assert 100_000 < most < 1_000_000
    *_, line = adapter_lines(stage(1000), {}, [setup])
    assert line == f"8 GPUs of 80 GB hold at most {most:,} users"
    check_memory(stage(most), 8, 80e9)
    for count in (most + 1, 1_000_000):
        with pytest.raises(
            UserError, match=rf"users\.count={most} at most, or lower users\.tokens or users\.width"
        ):
            check_memory(stage(count), 8, 80e9)
