"""Opening of the refiners' gates: the mean magnitude of each block's, per LLM."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.dit import LIDiT
from pipeline.data.batch import Batch
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


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
        for name, module, gates in _gates(network, families):
            self.names.append(name)
            module.register_forward_hook(partial(self._measure, name, gates))

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

    def _measure(
        self, name: str, gates: Sequence[int], module: nn.Module, inputs: Any, outputs: Sequence[Tensor]
    ) -> None:
        # Most steps measure nothing: the hook then costs one comparison and no kernel.
        if self.on:
            magnitudes = torch.stack([outputs[index].detach().float().abs().mean() for index in gates])
            self._measured.append((name, magnitudes.mean()))


def _gates(network: LIDiT, families: Sequence[str]) -> Iterator[tuple[str, nn.Module, Sequence[int]]]:
    """Yield a name, the modulation that makes the gates, and the indices of its vectors that are gates."""
    fusion = network.fusion
    # Not strict: without refiners there is nothing to pair with the families.
    for family, refiner in zip(families, fusion.refiners or [], strict=False):
        for number, block in enumerate(refiner.blocks):  # pyright: ignore[reportArgumentType]
            if block.gates is not None:
                # The refiner's modulation makes only its two gates, one for attention and one for the
                # feed-forward layer.
                yield f"gate_refiner_{family}_{number}", block.gates, (0, 1)

    for number, block in enumerate(fusion.collaborative.blocks if fusion.collaborative is not None else []):
        branches: Any = block.branches
        for family, branch in zip(families, branches, strict=True):
            # Shift, scale and gate of attention, then the same of the feed-forward layer: every third one is
            # a gate.
            yield f"gate_collaborative_{family}_{number}", branch.modulation, (2, 5)
