"""Validation of an elastic network: the loss of each of its parts."""

from typing import TYPE_CHECKING

from pipeline.training.validation import Validation, held_out_losses

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class ElasticValidation(Validation):
    """Logs besides `elastic/loss_<part>` of the averaged weights on the same batches, such as
    `elastic/loss_depth14_patch2`."""

    def validate(self, trainer: "Trainer") -> float:
        """Measure the losses of all parts, and return the mean loss of the default one, which is that of
        `Validation`."""
        loss = super().validate(trainer)
        default, *others = trainer.stage.elastic.choices(trainer.sizes)

        values = {f"loss_{default}": loss}
        with trainer.engine.averaged():
            for part in others:
                values[f"loss_{part}"] = float(held_out_losses(trainer, part).mean())
        trainer.log.scores("elastic", trainer.state.step, trainer.state.samples, values)
        return loss
