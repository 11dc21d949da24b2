"""From a stage to what it is made of: the snapshots that it reads, the families in them, the network that fits them."""

from dataclasses import replace

from data_prep.schema import Family
from data_prep.store import Store, open_store
from model.config import DiTConfig
from model.dit import LIDiT
from pipeline.config import StageConfig
from pipeline.distributed import Ranks
from pipeline.sources import Corpus, open_corpus


def resolve(stage: StageConfig) -> tuple[StageConfig, Corpus]:
    """The stage with `latest` replaced by the snapshots' ids, and these snapshots, checked against the stage.

    Raises:
        UserError: no such store or snapshot, a family is missing from it, or was made in another way than the stage says.
    """
    corpus = open_corpus(stage)
    ids = [source.snapshot.id for source in corpus.sources]
    data = replace(
        stage.data,
        snapshot=stage.data.snapshot if stage.data.datasets else ids[0],
        datasets={name: replace(share, snapshot=id) for (name, share), id in zip(stage.data.datasets.items(), ids, strict=False)},
    )
    return replace(stage, data=data), corpus


def latents_family(stage: StageConfig, corpus: Corpus) -> Family:
    """The latents family that the stage trains on."""
    return corpus.families[stage.data.latents]


def text_families(stage: StageConfig, corpus: Corpus) -> dict[str, Family]:
    """The text families in fusion order: the corpus's, or those of the run's own encoders."""
    if stage.fusion.encode == "families":
        return {name: corpus.families[name] for name in stage.fusion.families}
    from pipeline.online import online_families  # imports transformers, which loader processes do without

    return online_families(stage)


def open_texts(stage: StageConfig, corpus: Corpus) -> Store:
    """Where the constants of the text families lie: in the first dataset, or in the run that encodes online.

    Raises:
        UserError: there is no such store.
    """
    return corpus.sources[0].dataset if stage.fusion.encode == "families" else open_store(str(stage.text_folder))


def prepare_texts(stage: StageConfig, corpus: Corpus, ranks: Ranks) -> None:
    """Before a network is built: make what a run that encodes online has in place of families; nothing for the others."""
    if stage.fusion.encode == "online":
        from pipeline.online import register_encoders  # as above

        register_encoders(stage, corpus.sources[0].dataset, ranks.device)


def network_sizes(stage: StageConfig, corpus: Corpus) -> tuple[DiTConfig, list[int]]:
    """Sizes of the DiT and widths of the text families in fusion order."""
    dit = stage.dit(int(latents_family(stage, corpus).info["channels"]))
    return dit, [int(family.info["width"]) for family in text_families(stage, corpus).values()]


def build_network(stage: StageConfig, corpus: Corpus) -> LIDiT:
    """The stage's network with fresh weights."""
    dit, widths = network_sizes(stage, corpus)
    return LIDiT(dit, stage.fusion, widths, checkpoint_every=stage.model.checkpoint_every)
