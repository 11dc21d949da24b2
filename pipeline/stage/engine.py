"""Settings of a stage's engine."""

from dataclasses import dataclass
from typing import Literal

from model.common.settings import bounded


@dataclass
class EngineConfig:
    """ZeRO settings; pipeline/engine/settings.py gives the reasons."""

    zero_stage: Literal[1, 2, 3] = 3
    """3 partitions weights, gradients and optimizer; 2 keeps whole weights; 1 whole gradients too. 0 has no
    fp32 gradients in DeepSpeed."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type that the network computes in; master weights are fp32 in any case."""
    micro_batch: int | None = bounded(None, 1, 10_000_000)
    """Samples per rank and micro-step; None = the whole share of the global batch at once."""
    reduce_bucket: int = bounded(200_000_000, 1, 10**12)
    """Values of gradients that are reduced at a time; the buffer is allocated once, in fp32."""
    prefetch_bucket: int = bounded(310_000_000, 0, 10**12)
    """Values that ZeRO-3 gathers ahead; below one block, nothing is prefetched."""
    max_live_parameters: int = bounded(1_200_000_000, 0, 10**12)
    """Values that ZeRO-3 keeps gathered at a time."""
    max_reuse_distance: int = bounded(600_000_000, 0, 10**12)
    """ZeRO-3 keeps what is used again within so many values."""
    persistence_threshold: int = bounded(100_000, 0, 10**12)
    """Smaller parameters stay whole on every rank."""
    sub_group_size: int = bounded(1_000_000_000, 1, 10**12)
    """Values that the optimizer updates at a time."""
    hpz: int = bounded(1, 1, 65_536)
    """Ranks of a node that keep a second copy of the weights between them (ZeRO++); 1 = none."""
    attention: Literal["auto", "cudnn", "flash", "efficient"] = "auto"
    """Attention kernels of a GPU: torch's choice by shape, or without cuDNN's or Flash's. Flash takes no
    mask: with it or `efficient`, padded text is read by the memory-efficient kernel."""
    ragged_text: bool = False
    """True if refiners and cross-attention read the text without padding. A GPU then runs attention over rows
    of any length, unless `attention` is `efficient`; a CPU pads for the attention alone. Losses differ by
    rounding."""
    reduce_once: bool = False
    """ZeRO-3 with several micro-batches per step: True if each rank adds up its gradients and the last
    micro-batch reduces them, which takes 4 bytes per parameter on every GPU: for networks of about 1B. Losses
    differ by rounding."""
    overlap_comm: bool = True
    """True if gradients are reduced while the backward pass runs."""
    timeout_minutes: int = bounded(10, 1, 10_000)
    """Minutes after which a collective that waits for a rank fails."""
