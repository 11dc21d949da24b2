"""Validation of an elastic network: the loss of each of its parts."""

from typing import TYPE_CHECKING

from pipeline.training.callbacks import Callback
from pipeline.training.validation import held_out_losses

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class ElasticValidation(Callback):
    """Logs `elastic/loss_<part>` of the averaged weights on held-out batches every
    `log.validate_every_samples`, such as `elastic/loss_depth14_patch2`."""

    def between_steps(self, trainer: "Trainer") -> None:
        """Validate all parts if it is due."""
        if not trainer.due(trainer.stage.log.validate_every_samples):
            return
        trainer.heartbeat.enter("validate", trainer.state.step)

        values = {}
        with trainer.engine.averaged():
            for part in trainer.stage.elastic.choices(trainer.sizes):
                values[f"loss_{part}"] = float(held_out_losses(trainer, part).mean())
        trainer.log.scores("elastic", trainer.state.step, trainer.state.samples, values)
