"""The host never waits for the device between the steps, and gathers wait for the weights that they read."""

import pytest

from tests.helpers import stream_tasks
from tests.helpers.distributed import on_ranks


@pytest.mark.parametrize("settings", [{"micro_batch": 3}, {"micro_batch": 3, "precision": "bf16"}], ids=str)
def test_micro_steps_wait_for_nothing_and_a_step_only_for_the_persistent_weights(settings):
    micro_steps, inside, whole = on_ranks(2, stream_tasks.waits_of_a_step, settings)[0]
    assert micro_steps == 2
    assert inside == {"reads": 0}
    assert whole == {"waits": 1}


def test_gathers_wait_for_the_step_and_for_published_weights():
    events = on_ranks(1, stream_tasks.order_of_gathers)[0]
    # The optimizer writes one sub-group after another.
    written = events.count("weights written")
    assert written > 0
    # `averaged` publishes twice: the average, and the weights again.
    assert events == ["weights written"] * written + ["ordered"] + ["ordered", "published"] * 2
