"""Muon (Jordan 2024) for the matrices of the blocks under ZeRO-3, AdamW for everything else.

DeepSpeed 0.19.8's own Muon clips by the norm of the orthogonalized updates instead of the gradient norm, so
that clipping at 1 shrinks every step, and more so in larger networks (5.6 instead of 0.55 on two ranks). Here
Muon is the inner optimizer: DeepSpeed calls it after it has clipped the gradients, one sub-group at a time
and in the same order on all ranks, so it may communicate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.adapter import is_adapter
from model.common.settings import bounded
from model.functional import product_dtype
from pipeline.engine.adamw import AdamWSettings
from pipeline.engine.layout import Layout
from pipeline.engine.optim import OPTIMIZERS, decays

MUON = "muon"
"""Name of the parameter group whose matrices are orthogonalized."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""Newton-Schulz iterations by default."""
_RMS = 0.2
"""Root mean square of an update: about AdamW's, so that one learning rate serves both (arXiv 2502.16982)."""


@OPTIMIZERS.register("muon")
@dataclass
class MuonSettings(AdamWSettings):
    """Settings of Muon, and of AdamW for the parameters that are not in its group."""

    momentum: float
    iterations: int = bounded(ITERATIONS, 1, 20)
    """Newton-Schulz iterations of a step; fewer cost less, and leave small singular values small."""

    moments: ClassVar[dict[str, tuple[str, ...]]] = {MUON: ("exp_avg",), **AdamWSettings.moments}
    zero_stages: ClassVar[tuple[int, ...]] = (3,)

    def group(self, name: str, shape: Sequence[int]) -> str:
        """Return the group of a parameter: Muon trains the matrices of blocks, but not the outer layers."""
        # The outer layers map to and from latents and texts: Muon is meant for matrices between hidden
        # layers. Adapters are small additions, and LoRA's matrices are factors of one, not maps.
        is_hidden = "blocks" in name.split(".") and not is_adapter(name)
        if is_hidden and len(shape) == 2 and decays(name, shape):
            return MUON
        return super().group(name, shape)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        adamw: dict[str, Any] = {"betas": (self.betas[0], self.betas[1]), "eps": self.eps, "fused": True}
        return Muon(groups, self.momentum, self.iterations, **adamw)

    def bind(self, optimizer: torch.optim.Optimizer, layout: Layout, masters: Sequence[Tensor]) -> None:
        """Give the optimizer the places of its matrices."""
        assert isinstance(optimizer, Muon)
        optimizer.bind(layout, masters)


@dataclass(frozen=True)
class _Piece:
    """Place of a matrix in every rank's flat tensor."""

    shape: tuple[int, ...]
    offset: int
    length: int


def orthogonalize(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return about the nearest orthogonal matrix, by Newton-Schulz in bf16 where the device has it.

    Args:
        matrix: [rows, columns].
        iterations: five bring all singular values above 0.0015 of the Frobenius norm to 0.65 to 1.21, three
            those above 0.017.

    Returns:
        [rows, columns].
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    x = x.to(product_dtype(x))
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # so that the Gram matrix is the smaller one

    # The Frobenius norm bounds the largest singular value, and the iteration converges only if that is below
    # about 1.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        # x <- a x + b G x + c G^2 x with G = x x^T: a polynomial in the singular values that pushes them
        # toward 1.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """AdamW, except for the group named `muon` of matrices, whose momentum is `exp_avg`."""

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float, iterations: int, **settings: Any
    ) -> None:
        """Make the optimizer; `bind` it to the masters before the first step.

        Args:
            groups: parameter groups as AdamW takes them, each with a `name`.
            momentum: decay of Muon's running mean of gradients, which is used with Nesterov's correction.
            iterations: of `orthogonalize`.
            settings: settings of AdamW.
        """
        super().__init__(groups, **settings)
        self._momentum, self._iterations = momentum, iterations
        self._pieces: dict[int, list[_Piece]] = {}
        self._world = 1

    def bind(self, layout: Layout, masters: Sequence[Tensor]) -> None:
        """Note the places of the matrices in the flat `masters`, one per sub-group of `layout`."""
        self._world = layout.world
        for master, group in zip(masters, layout.groups, strict=True):
            offset, pieces = 0, []
            for _, shape in group:
                # The partition of ZeRO-3: see `pipeline.engine.layout`.
                length = -(-math.prod(shape) // layout.world)
                pieces.append(_Piece(shape, offset, length))
                offset += length
            self._pieces[id(master)] = pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every master that has a gradient. Collective: all ranks step the masters in one order."""
        # The own group first, since AdamW's step runs over all groups and skips masters without a gradient.
        for group in self.param_groups:
            if group["name"] == MUON:
                for master in group["params"]:
                    if master.grad is not None:
                        self._step(group, master)
                        master.grad = None  # so that AdamW skips it
        return super().step(closure)

    def _step(self, group: dict[str, Any], master: Tensor) -> None:
        state, gradient = self.state[master], master.grad
        assert gradient is not None
        # The same state that `MasterWeights.moments` makes for a checkpoint.
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, requires_grad=False)

        state["step"] += 1
        # Elementwise, so it needs no communication: only the orthogonalization needs whole matrices.
        momentum: Tensor = state["exp_avg"].lerp_(gradient, 1 - self._momentum)
        update = gradient.lerp(momentum, self._momentum)

        # As many matrices at a time as there are ranks, so that every rank has one to orthogonalize.
        pieces = self._pieces[id(master)]
        for start in range(0, len(pieces), self._world):
            self._orthogonalize(update, pieces[start : start + self._world])
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonalize(self, update: Tensor, pieces: Sequence[_Piece]) -> None:
        """Orthogonalize up to one matrix per rank, each on a rank of its own, in place in `update`."""
        rank = dist.get_rank() if self._world > 1 else 0
        # Ranks without a matrix send and receive nothing in their place, but take part in the exchange.
        lengths = [piece.length for piece in pieces] + [0] * (self._world - len(pieces))
        own = pieces[rank] if rank < len(pieces) else None

        # Every rank sends its piece of matrix i to rank i, and gets back its piece of the result.
        # bf16 halves the traffic, and the iteration rounds to bf16 in any case.
        sent = torch.cat([update[piece.offset : piece.offset + piece.length] for piece in pieces]).bfloat16()
        whole = self._exchange(sent, lengths, [lengths[rank]] * self._world)
        if own is not None:
            numel = math.prod(own.shape)
            matrix = orthogonalize(whole[:numel].view(own.shape), self._iterations)
            # An orthogonal matrix has a root mean square of 1 / sqrt(longer side); this brings every shape to
            # `_RMS`.
            whole[:numel] = (_RMS * math.sqrt(max(own.shape)) * matrix).flatten()

        received = self._exchange(whole, [lengths[rank]] * self._world, lengths)
        for piece, values in zip(pieces, received.split(lengths[: len(pieces)]), strict=True):
            update[piece.offset : piece.offset + piece.length] = values

    def _exchange(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send `sent[i]` of the values to rank i, and return the `received[i]` values from each rank i."""
        if self._world == 1:
            return values
        output = values.new_empty(sum(received))
        dist.all_to_all_single(output, values, list(received), list(sent))
        return output
