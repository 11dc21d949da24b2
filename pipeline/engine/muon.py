"""Muon for the blocks' matrices on ZeRO-3's shards, AdamW for all else.

DeepSpeed 0.19.8 has a Muon of its own, which takes the norm of the orthogonalised updates for that of the gradients: clipping
at 1 then shrinks every step, the more the larger the network (measured on two ranks: 5.6 where the gradients' norm was 0.55).
This one is the inner optimizer, which DeepSpeed calls after it has clipped the gradients, one sub-group at a time and on all
ranks in the same order, so that it may communicate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.layout import Layout

MUON = "muon"
"""Name of the parameter group that it is for."""
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_RMS = 0.2
"""Root mean square of an update: about AdamW's, so that one learning rate and one decay serve both (arXiv 2502.16982)."""


@dataclass(frozen=True)
class _Piece:
    """A matrix's place in every rank's flat tensor."""

    shape: tuple[int, ...]
    offset: int
    length: int


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix (singular values 0.7 to 1.2), by Newton-Schulz iterations in bf16 (Jordan 2024)."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """AdamW but for the group named `muon`, which holds whole matrices; its momentum is kept as `exp_avg`."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **settings: Any) -> None:
        """Make the optimizer; `bind` it to the shards before the first step.

        Args:
            groups: as AdamW takes them, each with a `name`.
            momentum: of Muon's running mean of gradients, used as Nesterov's.
            settings: AdamW's.
        """
        super().__init__(groups, **settings)
        self._momentum = momentum
        self._pieces: dict[int, list[_Piece]] = {}
        self._world = 1

    def bind(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Tell which matrices lie where in the flat `tensors`, one per sub-group of `layout`."""
        self._world = layout.world
        for tensor, group in zip(tensors, layout.groups, strict=True):
            offset, pieces = 0, []
            for _, shape in group:
                length = -(-math.prod(shape) // layout.world)
                pieces.append(_Piece(shape, offset, length))
                offset += length
            self._pieces[id(tensor)] = pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor that has a gradient. Collective, with the same tensors on all ranks."""
        for group in self.param_groups:
            if group["name"] == MUON:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._step(group, tensor)
                        tensor.grad = None  # AdamW then passes it over
        return super().step(closure)

    def _step(self, group: dict[str, Any], tensor: Tensor) -> None:
        state, gradient = self.state[tensor], tensor.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor, requires_grad=False)
            state["exp_avg_sq"] = tensor.new_zeros(0, requires_grad=False)
        state["step"] += 1
        momentum: Tensor = state["exp_avg"].lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(momentum, self._momentum)
        pieces = self._pieces[id(tensor)]
        for start in range(0, len(pieces), self._world):
            self._orthogonalize(update, pieces[start : start + self._world])
        tensor.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonalize(self, update: Tensor, pieces: Sequence[_Piece]) -> None:
        """Orthogonalise as many matrices as there are ranks, each on one of them, in place."""
        rank = dist.get_rank() if self._world > 1 else 0
        lengths = [piece.length for piece in pieces] + [0] * (self._world - len(pieces))
        mine = pieces[rank] if rank < len(pieces) else None
        sent = torch.cat([update[piece.offset : piece.offset + piece.length] for piece in pieces]).bfloat16()
        whole = self._exchange(sent, lengths, [lengths[rank]] * self._world)
        if mine is not None:
            numel = math.prod(mine.shape)
            matrix = orthogonalize(whole[:numel].view(mine.shape))
            whole[:numel] = (_RMS * math.sqrt(max(mine.shape)) * matrix).flatten()
        received = self._exchange(whole, [lengths[rank]] * self._world, lengths)
        for piece, values in zip(pieces, received.split(lengths[: len(pieces)]), strict=True):
            update[piece.offset : piece.offset + piece.length] = values

    def _exchange(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give each rank its `sent` values, and take as many as `received` from each."""
        if self._world == 1:
            return values
        output = values.new_empty(sum(received))
        dist.all_to_all_single(output, values, list(received), list(sent))
        return output
