"""Gradients are reduced once per step, with the weights of a reduction per micro-step."""

import pytest

from tests.helpers import stream_tasks
from tests.helpers.distributed import on_ranks

MICRO_STEPS = 3


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-3)])
def test_one_reduction_per_step_has_the_losses_of_one_per_micro_step(precision, tolerance):
    settings = {"micro_batch": 6 // MICRO_STEPS, "precision": precision, "reduce_bucket": 10_000_000}
    each = on_ranks(2, stream_tasks.reductions, settings)
    once = on_ranks(2, stream_tasks.reductions, settings | {"reduce_once": True})
    for (calls, losses, masters), (fewer, others, same) in zip(each, once, strict=True):
        assert (calls, fewer) == (MICRO_STEPS, 1)
        assert others == pytest.approx(losses, rel=tolerance)
        assert same == pytest.approx(masters, rel=tolerance)
        assert losses[0] != losses[-1]
