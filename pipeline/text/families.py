"""The text families that a stage fuses: stored ones, or those of the encoders that the run itself has.

`pipeline.text.online` is imported by the runs that have encoders: it loads transformers, which takes seconds.
"""

from functools import partial

import torch

from data_prep.dataset.schema import Family
from data_prep.store.store import open_store
from pipeline.runtime.distributed import Distributed
from pipeline.stage.config import StageConfig
from pipeline.stage.corpus import Corpus, families_read
from pipeline.text.prompts import PromptReader, load_llm
from pipeline.text.texts import TextConstants


def text_families(stage: StageConfig, corpus: Corpus, clips: bool = False) -> dict[str, Family]:
    """Return the text families of images, or those of clips, in fusion order: the corpus's, or those of the
    run's own encoders."""
    # In fusion order: the network's refiners are matched to the families by position.
    if stage.fusion.encode == "families":
        return {name: corpus.families[name] for name in stage.fusion.families_of(clips)}

    from pipeline.text.online import online_families

    return online_families(stage, clips)


def load_constants(stage: StageConfig, corpus: Corpus, device: torch.device) -> dict[str, TextConstants]:
    """Read what all captions share under each text family, of images and of clips.

    A family of clips gets the standardization of the family of images whose place it takes, so that the
    network reads a word alike behind either instruction.

    Raises:
        UserError: if a family lacks some of it, or is damaged.
    """
    constants: dict[str, TextConstants] = {}
    for image, clip in zip(stage.fusion.families, stage.fusion.families_of(clips=True), strict=True):
        for name in dict.fromkeys((image, clip)):
            stored = _stored_constants(stage, corpus, name, device)
            own = next(dataset for dataset in stored if dataset is not None)

            shared = own if name == image else own.standardized_like(constants[image])
            constants[name] = shared.rescaled(stored)

    return constants


def _stored_constants(
    stage: StageConfig, corpus: Corpus, name: str, device: torch.device
) -> list[TextConstants | None]:
    """Return a family's constants in each dataset, None where it is not read; of an encoder of the run, those
    in the run's folder."""
    if stage.fusion.encode == "online":
        store = open_store(str(stage.text_folder))

        family = text_families(stage, corpus, name not in stage.fusion.families)[name]
        return [TextConstants.load(store, family, device)]

    stored: list[TextConstants | None] = []
    for source in corpus.sources:
        if name in families_read(stage, source.snapshot.buckets):
            family = source.snapshot.families[name]
            stored.append(TextConstants.load(source.dataset, family, device))
        else:
            stored.append(None)

    return stored


def open_reader(stage: StageConfig, corpus: Corpus, device: torch.device) -> PromptReader:
    """Return a reader of prompts, which loads no LLM yet.

    Raises:
        UserError: if what all captions share is missing or damaged.
    """
    constants, load = load_constants(stage, corpus, device), partial(load_llm, device=device)

    images, clips = (text_families(stage, corpus, kind) for kind in (False, True))
    reader = PromptReader(images, {name: constants[name] for name in images}, load)
    if list(clips) != list(images):
        # Under the names of the images' families, by which the network's branches are known.
        named = dict(zip(images, clips.values(), strict=True))
        own = {name: constants[family.name] for name, family in named.items()}
        reader.clips = PromptReader(named, own, load)

    return reader


def prepare_texts(stage: StageConfig, corpus: Corpus, ranks: Distributed) -> None:
    """Measure what a run that encodes online needs instead of stored families.

    Call it before the network is built.

    Raises:
        UserError: if an encoder cannot be loaded, or the dataset has no captions yet.
    """
    if stage.fusion.encode == "online":
        from pipeline.text.online import register_encoders

        register_encoders(stage, corpus.sources[0].dataset, ranks.device)
