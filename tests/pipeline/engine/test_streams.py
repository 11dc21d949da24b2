"""The host never waits for the device between the steps, and gathers wait for the weights that they read."""

import pytest
import torch

from model.block import Block
from tests.helpers import stream_tasks
from tests.helpers.distributed import on_ranks


@pytest.mark.parametrize("settings", [{"micro_batch": 3}, {"micro_batch": 3, "precision": "bf16"}], ids=str)
def test_neither_micro_steps_nor_the_step_stop_the_device(settings):
    micro_steps, inside, whole = on_ranks(2, stream_tasks.waits_of_a_step, settings)[0]
    assert micro_steps == 2
    assert inside == {"reads": 0}
    assert whole == {}


def test_gathers_wait_for_the_step_and_for_published_weights():
    events = on_ranks(1, stream_tasks.order_of_gathers)[0]
    # The optimizer writes one sub-group after another.
    written = events.count("weights written")
    assert written > 0
    # `averaged` publishes twice: the average, and the weights again.
    assert events == ["weights written"] * written + ["ordered"] + ["ordered", "published"] * 2


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16"}, pytest.param({"precision": "fp32", "micro_batch": None}, marks=pytest.mark.slow)],
    ids=str,
)
def test_refiners_are_gathered_whole_with_the_same_losses(settings):
    """A refiner's block has ten layers, each of which would be gathered by itself."""
    whole = on_ranks(2, stream_tasks.leaves_and_losses, None, settings)
    blocks = on_ranks(2, stream_tasks.leaves_and_losses, (Block,), settings)
    (gathers, losses, masters), (more, others, same) = whole[0], blocks[0]
    # Not bit for bit: where several layers read a tensor, their gradients are added in another order.
    assert losses == pytest.approx(others, rel=1e-6)
    assert masters == pytest.approx(same, rel=1e-6)
    assert len(set(losses)) == 4
    assert gathers <= 0.5 * more


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16", "micro_batch": None}, {"sub_group_size": 2_000, "micro_batch": None}],
    ids=str,
)
def test_the_step_on_flat_shards_is_deepspeeds_in_a_few_operations(settings):
    ours = on_ranks(2, stream_tasks.step_with, True, settings)
    theirs = on_ranks(2, stream_tasks.step_with, False, settings)
    for (_, masters), (_, expected) in zip(ours, theirs, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(masters, expected, strict=True))
    # DeepSpeed takes at least two for each of the 200 parameters.
    assert theirs[0][0] > 400
    assert ours[0][0] < theirs[0][0] / 4
