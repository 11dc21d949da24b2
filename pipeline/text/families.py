"""The text families that a stage fuses: stored ones, or those of the encoders that the run itself has.

`pipeline.text.online` is imported by the runs that have encoders: it loads transformers, which takes seconds.
"""

from data_prep.dataset.schema import Family
from data_prep.store.store import Store, open_store
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus


def text_families(stage: StageConfig, corpus: Corpus) -> dict[str, Family]:
    """Return the text families in fusion order: the corpus's, or those of the run's own encoders."""
    # In fusion order: the network's refiners are matched to the families by position.
    if stage.fusion.encode == "families":
        return {name: corpus.families[name] for name in stage.fusion.families}

    from pipeline.text.online import online_families

    return online_families(stage)


def open_texts(stage: StageConfig, corpus: Corpus) -> Store:
    """Open the store of the text families' constants: the first dataset's, or the run's own.

    Raises:
        UserError: if there is no such store.
    """
    return (
        corpus.sources[0].dataset if stage.fusion.encode == "families" else open_store(str(stage.text_folder))
    )


def prepare_texts(stage: StageConfig, corpus: Corpus, ranks: Distributed) -> None:
    """Measure what a run that encodes online needs instead of stored families.

    Call it before the network is built.

    Raises:
        UserError: if an encoder cannot be loaded, or the dataset has no captions yet.
    """
    if stage.fusion.encode == "online":
        from pipeline.text.online import register_encoders

        register_encoders(stage, corpus.sources[0].dataset, ranks.device)
