"""Hooks for features of training, so that they need no change of the loop."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.data.batch import Batch

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class Callback:
    """Something that happens at times beside the training steps; every method is called on all ranks alike.

    A callback must leave the run's numbers as they are: what it computes with weights or random numbers, it
    puts back.
    """

    def quantities(self) -> Sequence[str]:
        """Return names that the callback adds to the trainer's `sums`; each is reported as a mean over the
        interval."""
        return ()

    def on_train_start(self, trainer: "Trainer") -> None:
        """Act before the first step of this start, after a checkpoint was loaded and blocks were compiled."""

    def before_step(self, trainer: "Trainer", batch: Batch) -> None:
        """Act on a batch before its step."""

    def after_micro_batch(self, trainer: "Trainer", batch: Batch, losses: Tensor, timesteps: Tensor) -> None:
        """Act on the losses fp32 [B] of a micro-batch at its timesteps, [B] or [B, N], after their backward
        pass."""

    def after_step(self, trainer: "Trainer", batch: Batch) -> None:
        """Act after a step and the update of the averages."""

    def between_steps(self, trainer: "Trainer") -> None:
        """Act between a report and a checkpoint, such as every `trainer.due(n)` samples."""
