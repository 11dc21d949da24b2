"""Copies between the CPU and a GPU for which the host does not wait.

A copy from or to ordinary memory makes the host wait for all work of the device; through page-locked memory
it is one more piece of that work.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the CPU."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start the copies, behind the work that makes the tensors.

        Args:
            tensors: all on one device.
        """
        self._copies, self._done = list(tensors), None
        if not tensors or not tensors[0].is_cuda:
            return
        self._copies = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> list[Tensor]:
        """Return the tensors on the CPU, once they are there; later work of the device is not waited for."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies
