"""The loss that keeps users apart (dispersion, after Premier, arXiv 2603.20725)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.condition import Condition
from pipeline.runtime.distributed import rank_and_world
from pipeline.training.callbacks import Callback
from pipeline.training.metrics import RankSums

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class UserDispersion(Callback):
    """Adds the dispersion of the global batch's users to the loss, and reports it with the size of their
    shifts."""

    def __init__(self, weight: float) -> None:
        """Add `weight` times the dispersion."""
        self.weight = weight

    def quantities(self) -> Sequence[str]:
        """Return the names of what is reported."""
        return ("dispersion", "user_shift")

    def on_train_start(self, trainer: "Trainer") -> None:
        """Add the term to the passes of a step."""
        trainer.passes.terms.append(partial(self.loss, trainer.sums))

    def loss(self, sums: RankSums, condition: Condition) -> Tensor:
        """Return the term; each micro-step has the same one, so that their mean is the batch's."""
        users = condition.users
        assert users is not None
        assert users.probes is not None
        assert users.answers is not None
        ids, shifts = gather_ids(users.probes), GatheredRows.apply(users.answers.float())
        loss = dispersion(shifts, ids)
        sums.add("dispersion", loss.detach()[None])
        sums.add("user_shift", root_mean_square(users.answers.detach())[users.probes >= 0])
        return self.weight * loss


def root_mean_square(shifts: Tensor) -> Tensor:
    """Return the root mean square fp32 [n] of each user's shift [n, K]."""
    return shifts.float().square().mean(dim=1).sqrt()


def dispersion(shifts: Tensor, ids: Tensor) -> Tensor:
    """Return the mean over users of log mean_j exp(-|s_i - s_j|), j all other users: [].

    The distance is a root mean square, of shifts whose own root mean square is bounded by 1: s -> s / sqrt(1
    + mean s^2). The loss is so at least -2 and does not depend on the width. Unbounded, shifts could grow
    forever.

    Args:
        shifts: [n, K].
        ids: int64 [n]: user of each row; of each user the first row counts, and -1 does not.
    """
    numbers = torch.arange(len(ids), device=ids.device)
    same = ids[:, None] == ids[None, :]
    # The number of the first row with the same id.
    first = torch.where(same, numbers[None, :], len(ids)).min(dim=1).values
    chosen = numbers[(first == numbers) & (ids >= 0)]
    if len(chosen) < 2:
        return shifts.sum() * 0.0  # part of the graph, as on all other steps

    bounded = shifts[chosen] * torch.rsqrt(1 + shifts[chosen].square().mean(dim=1, keepdim=True))
    # Not by products of matrices, which lose small distances; at 0, as at the start, the gradient is 0.
    distances = torch.cdist(bounded, bounded, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / math.sqrt(shifts.shape[1])

    itself = torch.eye(len(chosen), dtype=torch.bool, device=ids.device)
    others = torch.where(itself, -torch.inf, -distances)
    return (torch.logsumexp(others, dim=1) - math.log(len(chosen) - 1)).mean()


def gather_ids(ids: Tensor) -> Tensor:
    """Return the ids of all ranks, int64 [n x ranks], in rank order. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return ids

    gathered = [torch.empty_like(ids) for _ in range(world)]
    dist.all_gather(gathered, ids.contiguous())
    return torch.cat(gathered)


class GatheredRows(torch.autograd.Function):
    """The rows [n, K] of all ranks, in rank order; every rank has equally many. Collective, and so is the
    backward pass.

    Each rank computes the same loss of all rows, and ZeRO averages over the ranks the gradients of the
    weights: the gradient of a rank's own rows is the sum over the ranks of what each found for them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather."""
        ctx.rank, ctx.world = rank_and_world()
        if ctx.world == 1:
            return rows.clone()

        gathered = [torch.empty_like(rows) for _ in range(ctx.world)]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum over the ranks first, then take the own rows."""
        (gradient,) = gradients
        if ctx.world == 1:
            return gradient

        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(ctx.world)[ctx.rank]
