"""Opening of the refiners' gates: the mean magnitude of each block's, per LLM."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.dit import LIDiT
from model.fusion import attended
from pipeline.data.batch import Batch
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


@dataclass(frozen=True)
class _Gates:
    """The gates of one block and LLM."""

    name: str
    region: nn.Module
    """Part of the network that gets the condition."""
    condition: int
    """Argument of its forward pass that is the condition."""
    modulation: nn.Module
    """Makes the gates from the condition."""
    indices: tuple[int, int]
    """Vectors of the modulation that are gates."""


class GateStats(Callback):
    """Measures the gates in steps that end with a report; they depend on timestep and text, so it takes a
    mean over a batch."""

    def __init__(self, network: LIDiT, families: Sequence[str]) -> None:
        """Hook onto the network, whose outputs stay as they are, on partitioned parameters too.

        Args:
            network: the network; nothing is measured if its refiners have no gates.
            families: names of its LLMs.
        """
        self.on = False
        self.names: list[str] = []
        self._measured: list[tuple[str, Tensor]] = []
        for gates in _gates(network, families):
            self.names.append(gates.name)
            # On the region, since a hook on a layer in it would change the compiled graph; and before its
            # forward pass, for which ZeRO-3 has just gathered its parameters.
            gates.region.register_forward_pre_hook(partial(self._measure, gates))

    def quantities(self) -> Sequence[str]:
        """Return one name per block and LLM."""
        return self.names

    def before_step(self, trainer: "Trainer", batch: Batch) -> None:
        """Measure in the step before a report."""
        # `step` counts finished steps, and the report follows this one.
        self.on = (trainer.state.step + 1) % trainer.stage.log.every_steps == 0

    def after_micro_batch(self, trainer: "Trainer", batch: Batch, losses: Tensor, timesteps: Tensor) -> None:
        """Add what was measured to the trainer's sums."""
        for name, magnitude in self.take():
            trainer.sums.add(name, magnitude)

    def after_step(self, trainer: "Trainer", batch: Batch) -> None:
        """Stop measuring."""
        self.on = False

    def take(self) -> list[tuple[str, Tensor]]:
        """Return (name, mean magnitude) of each forward pass since the last call."""
        # Emptied per micro-batch, since the sums count each forward pass as one observation.
        measured, self._measured = self._measured, []
        return measured

    @torch.no_grad()
    def _measure(self, gates: _Gates, region: nn.Module, inputs: Any) -> None:
        # Most steps measure nothing: the hook then costs one comparison and no kernel.
        if self.on:
            vectors = gates.modulation(inputs[gates.condition])
            magnitudes = torch.stack([vectors[index].float().abs().mean() for index in gates.indices])
            self._measured.append((gates.name, magnitudes.mean()))


def _gates(network: LIDiT, families: Sequence[str]) -> Iterator[_Gates]:
    """Yield the gates of all refiners."""
    fusion = network.fusion
    families = attended(fusion.config, families)
    # Not strict: without refiners there is nothing to pair with the families.
    for family, refiner in zip(families, fusion.refiners or [], strict=False):
        for number, block in enumerate(refiner.blocks):  # pyright: ignore[reportArgumentType]
            if block.gates is not None:
                # The refiner's modulation makes only its two gates, one for attention and one for the
                # feed-forward layer.
                yield _Gates(f"gate_refiner_{family}_{number}", block, 2, block.gates, (0, 1))

    for number, block in enumerate(fusion.collaborative.blocks if fusion.collaborative is not None else []):
        branches: Any = block.branches
        for family, branch in zip(families, branches, strict=True):
            # Shift, scale and gate of attention, then the same of the feed-forward layer: every third one is
            # a gate.
            yield _Gates(f"gate_collaborative_{family}_{number}", branch, 3, branch.modulation, (2, 5))
