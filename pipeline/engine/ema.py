"""Moving averages of the weights, kept by each rank for the fp32 shard that it owns: no gather in the step."""

from collections.abc import Sequence

import torch
from torch import Tensor


def warm_decay(decay: float, updates: int) -> float:
    """Decay of update number `updates` (from 0): min(decay, (1 + updates) / (10 + updates)).

    So the average follows closely while the weights still move far, instead of keeping their random start for the first
    1 / (1 - decay) steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """One exponential moving average of this rank's fp32 shard.

    The averages are the masters' pieces, tensor by tensor, so they reshard like them. Nothing else is state: the number of
    the update comes from the samples seen.
    """

    def __init__(self, decay: float, master_weights: Sequence[Tensor]) -> None:
        self.decay = decay
        self.master_weights = list(master_weights)
        self.averages = [master.detach().clone() for master in master_weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the masters: average += (1 - decay) * (master - average), as update number `updates`."""
        weight = 1 - warm_decay(self.decay, updates)
        torch._foreach_lerp_(self.averages, [master.detach() for master in self.master_weights], weight)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the masters."""
        torch._foreach_copy_(self.averages, [master.detach() for master in self.master_weights])  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and masters in place; called twice, nothing has changed, bit for bit."""
        for average, master in zip(self.averages, self.master_weights, strict=True):
            kept = master.detach().clone()
            master.copy_(average)
            average.copy_(kept)
