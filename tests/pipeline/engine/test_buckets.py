"""Gradients through ZeRO-3's buckets: DeepSpeed's bits by fewer operations."""

import pytest
import torch

from tests.helpers import stream_tasks
from tests.helpers.distributed import on_ranks


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {"precision": "bf16", "micro_batch": 2, "reduce_bucket": 10_000_000}),
        (2, {"precision": "bf16", "micro_batch": 2}),
        (2, {"precision": "bf16", "micro_batch": 2, "reduce_once": True}),
        (3, {"precision": "fp32", "micro_batch": None}),
        pytest.param(3, {"precision": "bf16", "micro_batch": 1}, marks=pytest.mark.slow),
        pytest.param(4, {"precision": "bf16", "micro_batch": None, "hpz": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_deepspeeds_in_fewer_operations(world, settings):
    ours = on_ranks(world, stream_tasks.backward_with, True, settings)
    theirs = on_ranks(world, stream_tasks.backward_with, False, settings)
    for (count, kept), (more, expected) in zip(ours, theirs, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
        # With all gradients in one bucket, what is left is the backward pass of the network itself.
        assert count < (0.7 if "reduce_bucket" in settings else 1) * more
