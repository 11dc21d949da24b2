"""FLOPs of the steps, from which the trainer reports model FLOPs utilization (MFU)."""

from collections.abc import Iterable, Mapping

from data_prep.dataset.schema import Family
from model.config import DiTConfig, FusionConfig
from model.flops import flops_per_sample
from pipeline.data.dataset import latent_shape


class SampleFlops:
    """The FLOPs of a sample of each bucket."""

    def __init__(
        self,
        sizes: DiTConfig,
        fusion: FusionConfig,
        latents: Family,
        texts: Iterable[Family],
        buckets: Iterable[str],
    ) -> None:
        """Keep what the FLOPs depend on.

        Args:
            sizes: sizes of the DiT.
            fusion: switches of the text side.
            latents: the latents family.
            texts: the text families in fusion order.
            buckets: of the data.
        """
        self.sizes = sizes
        self.fusion = fusion
        self.latents = latents
        infos = [family.info for family in texts]
        self.widths = [int(info["width"]) for info in infos]
        self.prefixes = [int(info["prefix_tokens"]) for info in infos]
        self.buckets = list(buckets)

    def mean(self, counts: Mapping[str, float], caption_tokens: float) -> float:
        """Return the mean FLOPs of the samples of an interval.

        Args:
            counts: how many losses the interval has under each name; those of a bucket are `loss_<bucket>`.
            caption_tokens: mean length of a caption, summed over all families.
        """
        samples = {bucket: counts.get(f"loss_{bucket}", 0) for bucket in self.buckets}
        flops = sum(
            count * self.per_sample(bucket, caption_tokens) for bucket, count in samples.items() if count
        )
        return flops / sum(samples.values())

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
