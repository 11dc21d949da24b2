"""The stage's network: its sizes, and building it whole or partitioned."""

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from model.blocks import Block
from model.config import DiTConfig
from model.dit import LIDiT
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.families import text_families


def network_sizes(stage: StageConfig, corpus: Corpus) -> tuple[DiTConfig, list[int]]:
    """Return the sizes of the DiT, and the widths of the text families in fusion order."""
    latents = latents_family(stage, corpus).info
    dit = stage.dit(int(latents["channels"]), axes=3 if "frames" in latents else 2)
    return dit, [int(family.info["width"]) for family in text_families(stage, corpus).values()]


def build_network(stage: StageConfig, corpus: Corpus) -> LIDiT:
    """Build the stage's network with fresh weights."""
    dit, widths = network_sizes(stage, corpus)
    return LIDiT(dit, stage.fusion, widths, checkpoint_every=stage.model.checkpoint_every)


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
