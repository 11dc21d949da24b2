"""FLOPs of the steps, from which the trainer reports model FLOPs utilization (MFU)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from data_prep.dataset.schema import Family
from model.config import DiTConfig
from model.flops import flops_per_sample
from model.sub_network import SubNetwork
from pipeline.data.dataset import latent_shape
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import is_clip


class SampleFlops:
    """The FLOPs of a sample of each bucket."""

    def __init__(
        self,
        sizes: DiTConfig,
        stage: StageConfig,
        latents: Family,
        texts: Mapping[bool, Iterable[Family]],
        buckets: Iterable[str],
    ) -> None:
        """Keep what the FLOPs depend on.

        Args:
            sizes: sizes of the DiT.
            stage: the stage.
            latents: the latents family.
            texts: the text families of images (False) and of clips (True), in fusion order.
            buckets: of the data.
        """
        self.sizes = sizes
        self.fusion, self.elastic = stage.fusion, stage.elastic
        self.latents = latents
        self.widths = [int(family.info["width"]) for family in texts[False]]
        self.prefixes: dict[bool, list[int]] = {}
        self.longest: dict[bool, list[int]] = {}
        """Most tokens of a caption of each LLM, of images (False) and of clips (True), as the prefixes."""
        for clips, families in texts.items():
            self.prefixes[clips] = [int(family.info["prefix_tokens"]) for family in families]
            self.longest[clips] = [int(family.identity.get("max_tokens", 0)) for family in families]
        self.buckets = list(buckets)

    def mfu(self, counts: Mapping[str, float], values: Mapping[str, float], peak: float) -> dict[str, float]:
        """Return the share of the peak that an interval has reached, `mfu`, and of an elastic network that of
        the steps of each part.

        Args:
            counts: how many observations each of `values` is the mean of.
            values: means over the interval.
            peak: FLOP/s of all ranks.
        """
        tokens = values["caption_tokens"]
        if not self.elastic.elastic:
            return {"mfu": self.mean(counts, tokens) * values["samples_per_second"] / peak}

        mfu, total = {}, 0.0

        for part in self.elastic.parts(self.sizes):
            flops = 0.0
            for bucket in self.buckets:
                samples = counts.get(f"loss_{bucket}_{part}", 0)
                flops += samples * self.per_sample(bucket, tokens, part) if samples else 0.0
            total += flops

            steps = counts.get(f"step_seconds_{part}")
            # Steps of a sandwich are counted under their second part, and run the full network besides.
            if steps and not self.elastic.sandwich:
                mfu[f"mfu_{part}"] = flops / (values[f"step_seconds_{part}"] * steps * peak)

        seconds = values["step_seconds"] * counts["step_seconds"]
        return {"mfu": total / (seconds * peak), **mfu}

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

    def per_sample(self, bucket: str, caption_tokens: float, part: SubNetwork | None = None) -> float:
        """Return the FLOPs of a sample, forward and backward.

        Args:
            bucket: the sample's bucket.
            caption_tokens: mean length of a caption, summed over all families.
            part: of an elastic network; None = the whole.
        """
        sizes = replace(self.sizes, depth=part.depth, patch=part.patch) if part else self.sizes
        # Only the sum over the families is known here, so each gets an equal share; the prefix is always read
        # whole.
        prefixes = self.prefixes[is_clip(bucket)]
        tokens = [prefix + int(caption_tokens / len(prefixes)) for prefix in prefixes]
        latents = latent_shape(self.latents, bucket)[1:]
        return flops_per_sample(sizes, self.fusion, self.widths, latents, tokens, prefixes)
