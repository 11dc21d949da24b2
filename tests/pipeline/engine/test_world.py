"""ZeRO-3's copies without loops over the ranks: the bytes of DeepSpeed, at a cost that does not grow."""

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from benchmarks.world import WORLDS, operations
from pipeline.engine import world as ours

SHAPES = [(13, 7), (5,), (64,), (3, 11), (1,)]


def fake_group(monkeypatch, rank, world, buffers):
    """Let this process be one of many; what it would send is kept."""
    group = SimpleNamespace(get_rank=lambda group=None: rank, get_world_size=lambda group=None: world)
    for module in (coalesced_collectives, ours):
        monkeypatch.setattr(module, "dist", group)
        monkeypatch.setattr(
            module, "_torch_reduce_scatter_fn", lambda buffer, own, group: buffers.append(buffer)
        )


@pytest.mark.parametrize("world", range(1, 33))
def test_a_reduction_sends_deepspeeds_bytes_and_returns_its_pieces(world, monkeypatch):
    generator = torch.Generator().manual_seed(world)
    for shapes in (SHAPES, SHAPES[:1], SHAPES[2:3]):
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        for rank in {0, world // 2, world - 1}:
            buffers = []
            fake_group(monkeypatch, rank, world, buffers)
            # Padding is not initialized there, and zero here.
            monkeypatch.setattr(coalesced_collectives.torch, "empty", torch.zeros)
            theirs = coalesced_collectives.reduce_scatter_coalesced([t.clone() for t in tensors])
            own = ours.reduce_scatter([tensor.clone() for tensor in tensors])
            monkeypatch.undo()
            # One rank sends nothing, where DeepSpeed sends to itself.
            assert len(buffers) == (2 if world > 1 else 1)
            assert torch.equal(buffers[0], buffers[-1])
            assert len(theirs) == len(own)
            assert all(map(torch.equal, theirs, own))


def handle(world, tensors):
    """A gather that has just arrived, of parameters that are cut among `world` ranks."""
    params, rows = [], []
    for tensor in tensors:
        piece = math.ceil(tensor.numel() / world)
        rows.append(
            torch.nn.functional.pad(tensor.flatten(), (0, piece * world - tensor.numel())).view(world, -1)
        )
        pieces = SimpleNamespace(ds_numel=piece, dtype=tensor.dtype)
        params.append(
            SimpleNamespace(
                ds_tensor=pieces, ds_numel=tensor.numel(), ds_shape=tensor.shape, data=None,
                ds_status=ZeroParamStatus.INFLIGHT,
            )
        )  # fmt: skip
    buffer = torch.cat(rows, dim=1).flatten()
    return ours.AllGatherCoalescedHandle(
        SimpleNamespace(wait=lambda: None), params, list(buffer.chunk(world)), world
    )


@pytest.mark.parametrize("world", range(1, 33))
def test_a_gather_makes_deepspeeds_parameters(world):
    generator = torch.Generator().manual_seed(world)
    for shapes in (SHAPES, SHAPES[:1], SHAPES[2:3]):
        tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        theirs, own = handle(world, tensors), handle(world, tensors)
        ours._loop_over_ranks(theirs)
        ours.wait_for_gather(own)
        for one, other, expected in zip(theirs.params, own.params, tensors, strict=True):
            assert torch.equal(one.data, expected)
            assert torch.equal(other.data, expected)
            assert other.ds_status == ZeroParamStatus.AVAILABLE


@pytest.mark.parametrize("kind", ["gather", "reduction"])
def test_the_cost_does_not_grow_with_the_number_of_processes(kind):
    counts = [operations(f"{kind}, ours", world) for world in WORLDS]
    assert max(counts) < 1.5 * min(counts)
    before = [operations(f"{kind}, DeepSpeed", world) for world in WORLDS]
    assert before[-1] > 20 * before[0]
    assert counts[0] < before[0]
