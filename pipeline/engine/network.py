"""The stage's network: its sizes, building it, and the weights that it starts from."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from model.adapter import freeze_base
from model.adapters import attach_adapters
from model.config import DiTConfig
from model.dit import LIDiT
from model.elastic.network import ElasticLIDiT
from model.elastic.weights import GrownWeights
from model.encoders.latent_spaces import encodes_clips
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, latents_family
from pipeline.text.families import text_families


def network_sizes(stage: StageConfig, corpus: Corpus) -> tuple[DiTConfig, list[int]]:
    """Return the sizes of the DiT, and the widths of the text families in fusion order."""
    latents = latents_family(stage, corpus).info
    has_time = "frames" in latents or encodes_clips(latents["downsampling"])
    dit = stage.dit(int(latents["channels"]), axes=3 if has_time else 2)
    return dit, [int(family.info["width"]) for family in text_families(stage, corpus).values()]


def build_network(stage: StageConfig, corpus: Corpus) -> LIDiT:
    """Build the stage's network with fresh weights; those that the stage does not train need no gradient."""
    return make_network(stage, *network_sizes(stage, corpus))


def make_network(stage: StageConfig, dit: DiTConfig, widths: Sequence[int]) -> LIDiT:
    """Build the network of a stage for data whose sizes are known.

    Args:
        stage: the stage.
        dit: sizes of the DiT.
        widths: widths of the text families in fusion order.
    """
    every = stage.model.checkpoint_every
    if stage.elastic.elastic:
        return ElasticLIDiT(dit, stage.fusion, widths, stage.elastic, every)

    network = attach_adapters(LIDiT(dit, stage.fusion, widths, every), stage.users, stage.lora)
    if stage.freeze == "base":
        freeze_base(network)
    return network


def starting_weights(
    stage: StageConfig, sizes: DiTConfig, weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return an earlier stage's weights with all that the network can make from them."""
    return GrownWeights(weights, sizes, stage.elastic) if stage.elastic.elastic else weights
