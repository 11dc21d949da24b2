"""Gradients that are reduced once per step.

ZeRO-3 reduces the gradients of each micro-step over the ranks and adds them up on the owner of each piece.
Here each rank adds them up by itself, in fp32, and the last backward pass reduces the sums while it runs. It
takes 4 bytes per parameter on every rank, and one collective per bucket and step, not per micro-step.
"""

from typing import Any

import torch
from torch import nn


def accumulate_in_fp32(module: nn.Module) -> None:
    """Let gradients of parameters in another type add up in fp32, where small ones are not lost."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32


class ReduceOnce:
    """The reduction of one optimizer."""

    def __init__(self, optimizer: Any) -> None:
        """Take over the times at which gradients are reduced.

        Args:
            optimizer: DeepSpeed's for ZeRO-3.

        Raises:
            AssertionError: if DeepSpeed has no switch for it.
        """
        # The switch is internal to DeepSpeed: without it, sums would be reduced again in each micro-step.
        if not hasattr(optimizer, "_coalesce_grad_reduction"):
            raise AssertionError("ZeRO-3 cannot put off the reduction of gradients: use DeepSpeed 0.19.8")
        self._optimizer = optimizer

    def before_backward(self, last: bool) -> None:
        """Decide whether the next backward pass reduces what it and those before it have added up.

        Args:
            last: True for the last one of a step.
        """
        self._optimizer._coalesce_grad_reduction = not last

    def finish(self) -> None:
        """Reduce the gradients of parameters that only earlier micro-steps have used. Collective."""
        left = []
        for group in self._optimizer.fp16_groups:
            left += [each for each in group if each.requires_grad and each.grad is not None]

        for parameter in left:
            self._optimizer.reduce_ready_partitions_and_remove_grads(parameter)
        if left:
            self._optimizer.independent_gradient_partition_epilogue()
