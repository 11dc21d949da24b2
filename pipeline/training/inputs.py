"""From a batch to what the network reads: clean latents and texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.dataset.schema import Family
from model.encoders.latent_spaces import normalize_latents
from model.condition import Text
from pipeline.data.loader import Batch
from pipeline.text.texts import TextConstants, to_text


def clean_latents(batch: Batch, latents: Family) -> Tensor:
    """Sample latents from the batch's moments with its own noise, normalized: fp32 [B, C, ...]."""
    sampled = batch.mean.float() + batch.std.float() * batch.posterior_noise
    return normalize_latents(sampled, latents.info)


def batch_texts(batch: Batch, families: Sequence[str], constants: dict[str, TextConstants], dtype: torch.dtype) -> list[Text]:
    """The batch's captions as the network reads them, in fusion order."""
    return [to_text(batch.texts[name], constants[name], dtype) for name in families]
