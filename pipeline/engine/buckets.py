"""Gradients on their way through ZeRO-3's buckets, in a few operations for each bucket.

DeepSpeed 0.19.8 copies each gradient into a buffer, which also casts it, and each piece out of the reduced
one: two operations for each parameter and micro-step. Here a bucket is put together by one operation, cast by
one, and all of its pieces are kept by one. The numbers are the same, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from pipeline.engine.world import reduce_scatter

_AVERAGE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_PIECES = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Buckets:
    """The buckets of one optimizer."""

    def __init__(self, optimizer: Any) -> None:
        """Take over what happens to a full bucket.

        Args:
            optimizer: DeepSpeed's for ZeRO-3, with `contiguous_gradients: false`: gradients then stay where
                the backward pass made them until their bucket is full.

        Raises:
            AssertionError: if DeepSpeed has other names for it.
        """
        # Names internal to DeepSpeed: with others, its own functions would go on unnoticed.
        if not all(hasattr(optimizer, name) for name in (_AVERAGE, _PIECES, "partition_grads")):
            raise AssertionError("ZeRO-3 reduces gradients in another way: use DeepSpeed 0.19.8")
        self._optimizer = optimizer
        setattr(optimizer, _AVERAGE, self.average)
        optimizer.partition_grads = self.keep

    def average(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        """Return this rank's piece of the mean gradient of each parameter over the ranks. Collective.

        Args:
            parameters: of one bucket, with their gradients.
            dtype: of the sums.
        """
        group = self._optimizer._get_param_partition_group(parameters[0])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return reduce_scatter(gradients, group, dtype)

    def keep(self, parameters: Sequence[nn.Parameter], pieces: Sequence[Tensor]) -> None:
        """Store or add up this rank's pieces, and drop the gradients.

        Args:
            parameters: of one bucket.
            pieces: what `average` returned for them.
        """
        places = getattr(self._optimizer, _PIECES)
        accelerator: Any = get_accelerator()
        own: list[Tensor] = []
        kept: list[Tensor] = []
        for parameter, piece in zip(parameters, pieces, strict=True):
            # The last ranks have nothing of a small parameter.
            if len(piece):
                own.append(piece)
                kept.append(places[parameter.ds_id][: len(piece)])  # type: ignore[attr-defined]
            # The gradient was made on another stream than this one, which reads it.
            if parameter.grad is not None and not accelerator.is_synchronized_device():
                parameter.grad.record_stream(accelerator.current_stream())
            parameter.grad = None

        if own and self._optimizer.micro_step_id == 0:
            torch._foreach_copy_(kept, own)  # pyright: ignore[reportPrivateImportUsage]
        elif own:
            torch._foreach_add_(kept, own)  # pyright: ignore[reportPrivateImportUsage]
