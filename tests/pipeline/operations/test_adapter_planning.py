"""The estimate of a frozen network: state for its adapters alone, and what the table of users takes."""

import pytest

from pipeline.estimate import adapter_lines
from pipeline.operations.planning import Setup, make_plan
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

    lines = list(adapter_lines(frozen, plan.parameters))
    assert "1,000 users: 61 kB each, 0.06 GB" in lines[1]
    assert not list(adapter_lines(stage, plain.parameters))
