"""ZeRO-3's optimizer step on this rank's flat shards, in the place of DeepSpeed's.

DeepSpeed 0.19.8 visits every parameter in its step: it casts and sums each gradient for the norm, copies the
gradients of each sub-group together, and cuts the updated weights up again. All of them are slices of a few
flat tensors: the gradients of one buffer, the masters and the weights of one tensor per sub-group. So a step
takes the norm of one tensor, scales it, updates all masters at once, and copies them.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from pipeline.engine.streams import order_gathers

NORM_PIECE = 2**18
"""Values that are summed at once on a CPU: their copy in fp64 stays in its cache."""


class FlatStep:
    """The step of one optimizer.

    Attributes:
        limit: largest norm of a step that is applied.
        norm: of the gradients of the last step before clipping; infinite if they were not finite.
    """

    def __init__(self, optimizer: Any, clip: float) -> None:
        """Take over the step of an optimizer.

        Args:
            optimizer: DeepSpeed's for ZeRO-3.
            clip: largest norm of the gradients; 0 = they are not clipped.

        Raises:
            AssertionError: if DeepSpeed keeps the gradients in another order than the masters.
        """
        self._optimizer, self._clip = optimizer, clip
        self.limit, self.norm = float("inf"), float("nan")

        self._masters: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        self._weights: list[Tensor] = optimizer.fp16_partitioned_groups_flat
        self._gradients: Tensor = optimizer.grad_partitions_flat_buffer
        lengths = [master.numel() for master in self._masters]
        # The order of the gradients is internal to DeepSpeed: another version may have another.
        if sum(lengths) != self._gradients.numel() or self._gradients.dtype != torch.float32:
            raise AssertionError("ZeRO-3's gradients are not one fp32 slice for each sub-group of masters")

        self._slices = self._gradients.split(lengths)
        optimizer.step = self

    @torch.no_grad()
    def __call__(self, closure: None = None) -> None:
        """Clip the gradients and update the weights, or skip the step on all ranks; then the gradients are
        zero. Collective."""
        # State of DeepSpeed's micro-steps and of its gathers.
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()
        self._optimizer.averaged_gradients = {}

        norm = self._total_norm()
        # The only value that the host waits for: it decides whether there is a step.
        self.norm = float(norm)
        self._optimizer.overflow = not math.isfinite(self.norm) or self.norm > self.limit
        self._optimizer._global_grad_norm = norm
        if not self._optimizer.overflow:
            self._update(norm)

        # DeepSpeed writes or adds to the slices of parameters that a micro-step uses. Any other would keep
        # its last gradient, which the next step would apply again.
        self._gradients.zero_()

    def _total_norm(self) -> Tensor:
        """Return the norm of the gradients of all ranks, fp64; infinite if a value is not finite."""
        # A sum in fp64, because fp32 would overflow before the values do; in pieces on a CPU, where torch
        # makes a copy in fp64, whose fresh memory takes ten times as long as the sum.
        pieces = [self._gradients] if self._gradients.is_cuda else self._gradients.split(NORM_PIECE)
        squares = [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces]
        square = torch.stack(squares).sum()
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        return torch.where(torch.isfinite(norm), norm, torch.inf)

    def _update(self, norm: Tensor) -> None:
        """Make the step with gradients of the norm `norm`."""
        if self._clip:
            self._gradients.mul_(1.0 / torch.clamp((norm + 1e-6) / self._clip, min=1.0))

        inner = self._optimizer.optimizer
        for index, (master, gradient) in enumerate(zip(self._masters, self._slices, strict=True)):
            master.grad = gradient
            inner.param_groups[self._optimizer.sub_group_to_group_id[index]]["params"].append(master)
        inner.step()
        # DeepSpeed keeps the groups empty between the steps.
        for group in inner.param_groups:
            group["params"] = []
        for master in self._masters:
            master.grad = None

        weights = [weight.data for weight in self._weights]
        torch._foreach_copy_(weights, self._masters)  # pyright: ignore[reportPrivateImportUsage]
        # Small parameters stay whole between the steps; DeepSpeed would gather them one by one.
        if persistent := self._optimizer.persistent_parameters:
            # Those of a part that was taken out of the network are whole still, with their old values.
            for parameter in persistent:
                if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                    parameter.partition()
            persistent[0].all_gather_coalesced(persistent).wait()
        # hpZ's second copies are old now.
        self._optimizer.invalidate_secondary_tensor()
        order_gathers(self._optimizer)
