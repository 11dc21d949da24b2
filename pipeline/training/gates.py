"""How far the refiners' gates have opened: the mean magnitude of each block's, per LLM."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.dit import LIDiT


class GateMeter:
    """Measures the gates in forward passes while `on`; they depend on timestep and text, so they are a mean over a batch."""

    def __init__(self, network: LIDiT, families: Sequence[str]) -> None:
        """Hook onto the network, which works as it did, on partitioned parameters too.

        Args:
            network: the network, or nothing is measured where its refiners have no gates.
            families: names of its LLMs.
        """
        self.on = False
        self.names: list[str] = []
        self._seen: list[tuple[str, Tensor]] = []
        for name, module, gates in _gates(network, families):
            self.names.append(name)
            module.register_forward_hook(partial(self._see, name, gates))

    def _see(self, name: str, gates: Sequence[int], module: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
        if self.on:
            magnitudes = torch.stack([outputs[index].detach().float().abs().mean() for index in gates])
            self._seen.append((name, magnitudes.mean()))

    def take(self) -> list[tuple[str, Tensor]]:
        """(name, mean magnitude) of each forward pass since the last call."""
        seen, self._seen = self._seen, []
        return seen


def _gates(network: LIDiT, families: Sequence[str]) -> Iterator[tuple[str, nn.Module, Sequence[int]]]:
    """Name, the modulation that makes them, and which of its vectors are gates, of all the gates of the refiners."""
    fusion = network.fusion
    for family, refiner in zip(families, fusion.refiners or [], strict=False):
        for number, block in enumerate(refiner.blocks):  # pyright: ignore[reportArgumentType]
            if block.gates is not None:
                yield f"gate_refiner_{family}_{number}", block.gates, (0, 1)
    for number, block in enumerate(fusion.collaborative.blocks if fusion.collaborative is not None else []):
        for family, branch in zip(families, block.branches, strict=True):  # pyright: ignore[reportArgumentType]
            yield f"gate_collaborative_{family}_{number}", branch.modulation, (2, 5)
