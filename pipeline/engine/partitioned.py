"""Building a network in pieces, for ZeRO-3."""

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from model.layers import PositionBlock
from model.region import Region

LEAVES = (Region, PositionBlock)
"""Parts that are gathered whole: each costs one hook in either direction instead of one per layer. An
input of each needs a gradient, which shows ZeRO-3 when the backward pass is through with the part; the
projections of hidden states and the embedding of the timestep have no such input."""


def build_partitioned(build: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    """Build a network in fp32, each layer partitioned as soon as it is built; `LEAVES` become leaves of
    ZeRO-3."""
    # The dtype comes from the configuration: where fp16 is not supported, DeepSpeed 0.19.8 ignores the
    # `dtype` argument.
    with deepspeed.zero.Init(config_dict_or_path=config | {"bf16": {"enabled": False}}):
        module = build()
    if leaves := {type(part) for part in module.modules() if isinstance(part, LEAVES)}:
        set_z3_leaf_modules(module, list(leaves))
    return module
