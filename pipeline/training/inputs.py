"""From a batch to what the network reads: clean latents and the condition."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.condition import Condition, Levels, Users
from model.conditions import CONDITIONS
from model.encoders.latent_spaces import normalize_latents
from model.fusion import attended, read_prefixes
from pipeline.data.batch import Batch
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, is_clip, latents_family
from pipeline.text.texts import TextConstants, to_text
from pipeline.training.micro_batches import MicroBatch, by_length, lengths_of_captions

TOKENS_MULTIPLE = 64
"""On a GPU, captions are padded to a multiple of so many tokens: cuDNN builds a plan of 0.3 s for every new
length, on each rank at another step. A CPU has no plans, and padding would only cost time."""


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
        self.fusion = stage.fusion
        self.conditions = {name: CONDITIONS[name] for name in stage.model.conditions}
        self.part = stage.elastic.by_default(stage.model)
        self.constants = constants
        self.dtype = dtype
        # As many for clips, which have one family in place of each of these.
        self.ragged = len(attended(stage.fusion, stage.fusion.families)) if stage.engine.ragged_text else 0
        self.disperses = stage.users.dispersion > 0
        self.multiple = 1
        if all(shared.mean.device.type == "cuda" for shared in constants.values()):
            self.multiple = TOKENS_MULTIPLE

    def text_lengths(
        self, longest: Sequence[int], prefixes: Sequence[int]
    ) -> list[tuple[tuple[int, ...], list[int]]]:
        """Return the lengths to which the captions of a micro-batch may be padded, each with those of the
        prefixes that are read, one per LLM that is attended to; nothing where any length may come.

        Args:
            longest: most tokens of a caption of each LLM, in fusion order.
            prefixes: tokens of its prefix.
        """
        if self.multiple == 1:
            return []
        read = read_prefixes(self.fusion, prefixes)
        lengths = lengths_of_captions(attended(self.fusion, longest), self.multiple)

        return [(captions, read) for captions in lengths]

    def micro_batches(self, batch: Batch, parts: Sequence[slice]) -> Iterator[MicroBatch]:
        """Divide a batch into micro-batches; `parts` has the ranges of equal size."""
        tokens = []
        for name in self._families(batch):
            packed, null = batch.texts[name], len(self.constants[name].null)
            counts = packed.lengths.tolist() if packed.counts is None else packed.counts
            tokens.append([count or null for count in counts])
        return by_length(parts, tokens, self.multiple, batch.u.device, self.ragged)

    def _families(self, batch: Batch) -> list[str]:
        """Return the batch's text families, in fusion order."""
        return self.fusion.families_of(is_clip(batch.bucket))

    def clean_latents(self, batch: Batch) -> Tensor:
        """Sample latents from the batch's moments with its own noise, normalized: fp32 [B, C, ...]."""
        # In fp32: the moments are bf16, and their sum would be rounded to 8 bits of precision.
        latents = batch.mean.float() + batch.std.float() * batch.posterior_noise
        return normalize_latents(latents, self.latents.info)

    def condition(self, batch: Batch, timesteps: Tensor, levels: Levels | None = None) -> Condition:
        """Return the batch's condition at times as `TrainingExample` has them; texts in fusion order."""
        texts = []
        for name in self._families(batch):
            texts.append(to_text(batch.texts[name], self.constants[name], self.dtype, self.multiple))
        extra = {name: condition.from_batch(batch) for name, condition in self.conditions.items()}
        users = None
        if batch.users is not None:
            # Probes are the users of the whole batch, whatever their micro-batch.
            users = Users(batch.users, probes=batch.users if self.disperses else None)
        return Condition(timesteps, texts, extra, levels, users, part=self.part)
