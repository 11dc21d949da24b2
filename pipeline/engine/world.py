"""ZeRO-3's copies around its collectives, whose host cost does not grow with the number of processes.

DeepSpeed 0.19.8 makes a view per process and parameter before each reduction and after each gather: at 512
processes that is 1.4 s of host per micro-step of the 1B network. Here a few operations per parameter move the
same bytes.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor

_loop_over_ranks = AllGatherCoalescedHandle.wait


def replace_loops() -> None:
    """Let ZeRO-3 wait for its gathers by the function below; `Buckets` has the reductions."""
    handles: Any = AllGatherCoalescedHandle
    handles.wait = wait_for_gather


def pieces_by_rank(tensors: Sequence[Tensor], world: int) -> Tensor:
    """Return one flat tensor that has, rank after rank, the rank's piece of each tensor.

    A piece has ceil(numel / world) elements; the last ones are padded with zeros.
    """
    rows = []
    for tensor in tensors:
        flat = tensor.view(-1)
        # A tensor that divides is not copied here.
        padded = F.pad(flat, (0, -len(flat) % world)) if len(flat) % world else flat
        rows.append(padded.view(world, -1))
    return rows[0].view(-1) if len(rows) == 1 else torch.cat(rows, dim=1).view(-1)


def parameters_from_pieces(buffer: Tensor, pieces: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Undo `pieces_by_rank`.

    Args:
        buffer: [ranks, elements of one rank].
        pieces: elements of one rank's piece of each parameter.
        sizes: elements of each parameter.
    """
    flats, offset = [], 0
    for piece, size in zip(pieces, sizes, strict=True):
        # Always a copy: a view would begin at any address, where kernels of a CPU sum in another order.
        flats.append(
            buffer[:, offset : offset + piece].clone(memory_format=torch.contiguous_format).view(-1)[:size]
        )
        offset += piece
    return flats


@torch.no_grad()
def reduce_scatter(
    tensors: Sequence[Tensor], group: Any = None, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Average each tensor over the ranks and return this rank's pieces, by one collective.

    Args:
        tensors: the same shapes on every rank.
        group: the ranks; None = all.
        dtype: of the sums; None = the tensors' own.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    buffer = pieces_by_rank(tensors, world)
    # All at once, and not tensor by tensor.
    buffer = buffer if dtype is None else buffer.to(dtype)
    length = len(buffer) // world
    own = buffer[rank * length : (rank + 1) * length]
    # One rank has its own mean already, which gloo would only copy to and fro.
    if world > 1:
        # Before the sum, as DeepSpeed does it: the same bits.
        buffer.div_(world)
        _torch_reduce_scatter_fn(buffer, own, group=group)

    results, offset = [], 0
    for tensor in tensors:
        piece = -(-tensor.numel() // world)
        # Without the padding, of which the last ranks have some, or nothing else.
        results.append(own[offset : offset + max(0, min(piece, tensor.numel() - rank * piece))])
        offset += piece
    return results


def wait_for_gather(handle: Any, handle_dependency: bool = True) -> None:
    """Wait for a gather and make its parameters whole: a drop-in for `AllGatherCoalescedHandle.wait`."""
    # Quantized gathers, and hardware that keeps buffers by hand, are not used here.
    if handle.quantization or not handle_dependency:
        _loop_over_ranks(handle, handle_dependency)
        return
    if handle.complete:
        return

    handle.allgather_handle.wait()
    # The partitions are consecutive views of one buffer.
    first = handle.partitions[0]
    buffer = first.as_strided((handle.world_size, len(first)), (len(first), 1))
    pieces = []
    for parameter in handle.params:
        assert parameter.ds_status == ZeroParamStatus.INFLIGHT, parameter.ds_summary()
        groups = parameter.ds_secondary_tensor_num_of_groups if handle.use_secondary_tensor else 1
        pieces.append(parameter.ds_tensor.ds_numel * groups)

    flats = parameters_from_pieces(buffer, pieces, [parameter.ds_numel for parameter in handle.params])
    for parameter, flat in zip(handle.params, flats, strict=True):
        parameter.data = flat.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    accelerator: Any = get_accelerator()
    if not accelerator.is_synchronized_device():
        # The buffer was allocated on the gathers' stream and is read on this one.
        first.record_stream(accelerator.current_stream())
    handle.complete = True
