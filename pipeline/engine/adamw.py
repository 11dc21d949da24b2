"""AdamW (Loshchilov and Hutter 2019), torch's own."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pipeline.engine.optim import DECAY, NO_DECAY, OPTIMIZERS, OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


@OPTIMIZERS.register("adamw")
@dataclass
class AdamWSettings(OptimizerSettings):
    """Settings of AdamW."""

    betas: tuple[float, float]
    eps: float

    # The names in torch's AdamW state, under which checkpoints store them.
    moments: ClassVar[dict[str, tuple[str, ...]]] = {DECAY: MOMENTS, NO_DECAY: MOMENTS}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer, fused: one kernel updates all parameters of a group."""
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)
