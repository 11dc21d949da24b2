"""The stage's network: its sizes, and building it."""

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
