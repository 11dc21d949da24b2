"""From a batch to what the network reads: clean latents and texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.dataset.schema import Family
from model.encoders.vae import normalize
from model.fusion import Text
from pipeline.data.loader import Batch
from pipeline.text.texts import TextConstants, to_text


def clean_latents(batch: Batch, latents: Family) -> Tensor:
    """Draw latents from the batch's moments with its own noise, normalised: fp32 [B, C, h, w]."""
    info = latents.info
    return normalize(batch.mean.float(), batch.std.float(), batch.posterior_noise, info["scaling_factor"], info["shift_factor"])


def batch_texts(batch: Batch, families: Sequence[str], constants: dict[str, TextConstants], dtype: torch.dtype) -> list[Text]:
    """The batch's captions as the network reads them, in fusion order."""
    return [to_text(batch.texts[name], constants[name], dtype) for name in families]
