"""FLOPs of the steps, from which the trainer reports model FLOPs utilization (MFU)."""

from typing import TYPE_CHECKING

from data_prep.dataset.schema import Family
from model.config import DiTConfig, FusionConfig
from model.flops import flops_per_sample
from pipeline.data.batch import Batch
from pipeline.data.dataset import latent_shape
from pipeline.training.callbacks import Callback

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


class StepFlops(Callback):
    """Adds the FLOPs of each step to the interval as `step_flops`."""

    def __init__(self, sizes: DiTConfig, fusion: FusionConfig, latents: Family, texts: list[Family]) -> None:
        """Keep what the FLOPs depend on.

        Args:
            sizes: sizes of the DiT.
            fusion: switches of the text side.
            latents: the latents family.
            texts: the text families in fusion order.
        """
        self.sizes = sizes
        self.fusion = fusion
        self.latents = latents
        self.widths = [int(family.info["width"]) for family in texts]
        self.prefixes = [int(family.info["prefix_tokens"]) for family in texts]

    def after_step(self, trainer: "Trainer", batch: Batch) -> None:
        """Add the step's FLOPs, over all ranks."""
        tokens = float(sum(text.lengths.float().mean() for text in batch.texts.values()))
        # Captions of this rank represent all ranks: close enough for a mean over an interval, and needs no
        # collective.
        flops = trainer.samples_of_step * self.per_sample(batch.bucket, tokens)
        trainer.state.interval.add("step_flops", flops)

    def per_sample(self, bucket: str, caption_tokens: float) -> float:
        """Return the FLOPs of a sample, forward and backward.

        Args:
            bucket: the sample's bucket.
            caption_tokens: mean length of a caption, summed over all families.
        """
        # Only the sum over the families is known here, so each gets an equal share; the prefix is always read
        # whole.
        tokens = [prefix + int(caption_tokens / len(self.prefixes)) for prefix in self.prefixes]
        latents = latent_shape(self.latents, bucket)[1:]
        return flops_per_sample(self.sizes, self.fusion, self.widths, latents, tokens, self.prefixes)
