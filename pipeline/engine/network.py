"""The stage's network: its sizes, and building it whole or partitioned."""

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from model.config import DiTConfig
from model.dit import DiTBlock, LIDiT
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.families import text_families


def network_sizes(stage: StageConfig, corpus: Corpus) -> tuple[DiTConfig, list[int]]:
    """Sizes of the DiT and widths of the text families in fusion order."""
    dit = stage.dit(int(latents_family(stage, corpus).info["channels"]))
    return dit, [int(family.info["width"]) for family in text_families(stage, corpus).values()]


def build_network(stage: StageConfig, corpus: Corpus) -> LIDiT:
    """The stage's network with fresh weights."""
    dit, widths = network_sizes(stage, corpus)
    return LIDiT(dit, stage.fusion, widths, checkpoint_every=stage.model.checkpoint_every)


def build_partitioned(build: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    """The network in fp32, each layer partitioned as soon as it is built."""
    # the type is told by the configuration: where fp16 is not supported, 0.19.8 overlooks the `dtype` argument
    with deepspeed.zero.Init(config_dict_or_path=config | {"bf16": {"enabled": False}}):
        module = build()
    if any(isinstance(block, DiTBlock) for block in module.modules()):
        set_z3_leaf_modules(module, [DiTBlock])
    return module
