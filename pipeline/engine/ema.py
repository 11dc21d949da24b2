"""Moving averages of the weights; each rank keeps those of its fp32 masters, so a step gathers nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def warm_decay(decay: float, updates: int) -> float:
    """Return the decay of update number `updates` (from 0): min(decay, (1 + updates) / (10 + updates)).

    The average then follows the weights closely while they change fast, instead of containing their random
    start for the first 1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """One exponential moving average of this rank's fp32 masters.

    The averages are partitioned like the masters, so a checkpoint moves them to other ranks in the same way.
    They are the only state: the number of an update is computed from the samples seen.
    """

    def __init__(self, decay: float, master_weights: Sequence[Tensor]) -> None:
        self.decay = decay
        self.master_weights = list(master_weights)
        self.averages = [master.detach().clone() for master in master_weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Make update number `updates`: average += (1 - decay) * (master - average)."""
        weight = 1 - warm_decay(self.decay, updates)
        masters = [master.detach() for master in self.master_weights]
        # All tensors in a few kernels, and without temporary copies of them.
        torch._foreach_lerp_(self.averages, masters, weight)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the masters."""
        masters = [master.detach() for master in self.master_weights]
        torch._foreach_copy_(self.averages, masters)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and masters in place; a second call restores both bit for bit."""
        for average, master in zip(self.averages, self.master_weights, strict=True):
            # One tensor at a time, so that the exchange needs little memory of its own.
            copy = master.detach().clone()
            master.copy_(average)
            average.copy_(copy)
