"""Building a network in pieces, for ZeRO-3."""

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from model.blocks import Block


def build_partitioned(build: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    """Build a network in fp32, each layer partitioned as soon as it is built; each block becomes a leaf of
    ZeRO-3."""
    # The dtype comes from the configuration: where fp16 is not supported, DeepSpeed 0.19.8 ignores the
    # `dtype` argument.
    with deepspeed.zero.Init(config_dict_or_path=config | {"bf16": {"enabled": False}}):
        module = build()
    if blocks := {type(block) for block in module.modules() if isinstance(block, Block)}:
        set_z3_leaf_modules(module, list(blocks))
    return module
