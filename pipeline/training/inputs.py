"""From a batch to what the network reads: clean latents and the condition."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.condition import Condition, Levels
from model.conditions import CONDITIONS
from model.encoders.latent_spaces import normalize_latents
from pipeline.data.batch import Batch
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.texts import TextConstants, to_text


class NetworkInputs:
    """Turns the batches of a stage into what its network reads."""

    def __init__(
        self, stage: StageConfig, corpus: Corpus, constants: Mapping[str, TextConstants], dtype: torch.dtype
    ) -> None:
        """Keep what all batches share.

        Args:
            stage: the resolved stage.
            corpus: its datasets.
            constants: what all captions of each text family share.
            dtype: of the texts' hidden states.
        """
        self.latents = latents_family(stage, corpus)
        self.families = stage.fusion.families
        self.conditions = {name: CONDITIONS[name] for name in stage.model.conditions}
        self.constants = constants
        self.dtype = dtype

    def clean_latents(self, batch: Batch) -> Tensor:
        """Sample latents from the batch's moments with its own noise, normalized: fp32 [B, C, ...]."""
        # In fp32: the moments are bf16, and their sum would be rounded to 8 bits of precision.
        latents = batch.mean.float() + batch.std.float() * batch.posterior_noise
        return normalize_latents(latents, self.latents.info)

    def condition(self, batch: Batch, timesteps: Tensor, levels: Levels | None = None) -> Condition:
        """Return the batch's condition at times as `TrainingExample` has them; texts in fusion order."""
        texts = [to_text(batch.texts[name], self.constants[name], self.dtype) for name in self.families]
        extra = {name: condition.from_batch(batch) for name, condition in self.conditions.items()}
        return Condition(timesteps, texts, extra, levels)
