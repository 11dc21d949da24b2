"""Online mode (`fusion.encode: online`): the trainer runs the LLMs itself, to try an encoder on small data.

Captions come from the pairs, so a dataset with pairs and latents is enough. The stage describes its encoders
(`text`) by the settings that a dataset's YAML has for families. What all captions share (hidden states of the
prefix and of the null caption, mean and std of each channel) is measured once, at the run's first start, and
kept in the run's folder as a store keeps a family: training, sampling and export read it in one way, and an
encoder that has changed since is refused. Hidden states are quantized and dequantized as a family's, so the
network sees the numbers that it would read from a store.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from data_prep.dataset.parts import register_family
from data_prep.dataset.schema import Family
from data_prep.dataset.snapshot_reader import read_constants, read_family
from data_prep.families.text import check_prefix, measure_constants, text_family
from data_prep.store.store import Store, open_store
from model.common.errors import UserError
from model.config import TextConfig
from model.encoders.text_encoder import TextEncoder, check_identity, load_encoder
from pipeline.stage.config import StageConfig
from pipeline.text.texts import PackedText, TextConstants, pack

log = logging.getLogger(__name__)


def register_encoders(stage: StageConfig, dataset: Store, device: torch.device) -> None:
    """Measure what all captions share and keep it in the run's folder, unless an earlier start did.

    Each rank may call this.

    Args:
        stage: describes the encoders.
        dataset: a store with pairs, whose captions are measured.
        device: of the encoders.

    Raises:
        UserError: if an encoder cannot be loaded, or the dataset has no captions yet.
    """
    store = open_store(str(stage.text_folder), create=True)
    for text in _every_encoder(stage):
        if not store.exists(Family(text.name, "text", {}).key):
            encoder = load_encoder(text, device)
            register_family(store, text_family(text, encoder), measure_constants(dataset, encoder))


def online_families(stage: StageConfig, clips: bool = False) -> dict[str, Family]:
    """Return the families of the stage's encoders of images, or of clips, in fusion order.

    They are read from the run's folder or, before its first start, made from the LLMs.
    """
    texts = _in_fusion_order(stage, clips)
    if stage.text_folder.is_dir():
        store = open_store(str(stage.text_folder))
        return {text.name: read_family(store, text.name) for text in texts}
    return {text.name: text_family(text, load_encoder(text, torch.device("cpu"))) for text in texts}


def _in_fusion_order(stage: StageConfig, clips: bool = False) -> list[TextConfig]:
    texts = {text.name: text for text in stage.text}
    return [texts[name] for name in dict.fromkeys(stage.fusion.families_of(clips))]


def _every_encoder(stage: StageConfig) -> list[TextConfig]:
    texts = [*_in_fusion_order(stage), *_in_fusion_order(stage, clips=True)]
    return list({text.name: text for text in texts}.values())


class OnlineTexts:
    """The stage's encoders, which run next to the network."""

    def __init__(
        self, stage: StageConfig, constants: Mapping[str, TextConstants], device: torch.device
    ) -> None:
        """Load the encoders.

        Args:
            stage: describes them.
            constants: of each, as `load_constants` returns them.
            device: of the encoders.

        Raises:
            UserError: if an encoder cannot be loaded, or has other outputs than at the run's first start.
        """
        store = open_store(str(stage.text_folder))
        self.constants = constants
        self._fusion = stage.fusion
        self._encoders: dict[str, TextEncoder] = {}
        self._warned: set[str] = set()
        for text in _every_encoder(stage):
            encoder, family = load_encoder(text, device), read_family(store, text.name)
            # The network has learned these hidden states: with others it would go on training, only worse.
            check_identity(encoder, text.name, family.identity)
            # The identity names files and settings. The prefix's states also show another library version or
            # kernel.
            check_prefix(encoder, family, read_constants(store, family))
            self._encoders[text.name] = encoder

    def encode(self, captions: Sequence[str], clips: bool = False) -> dict[str, PackedText]:
        """Return a batch's captions as each family would store them.

        The result depends only on the batch, since nothing is kept from one batch to the next: so a resumed
        run repeats an uninterrupted one.

        Args:
            captions: one per sample; an empty one is the null caption.
            clips: True if they are captions of clips.

        Returns:
            Family -> packed captions.

        Raises:
            UserError: if hidden states are not finite.
        """
        stripped = [caption.strip() for caption in captions]
        # Each caption once: small datasets repeat them within a batch.
        distinct = [caption for caption in dict.fromkeys(stripped) if caption]
        packed = {}
        for name in dict.fromkeys(self._fusion.families_of(clips)):
            encoder = self._encoders[name]
            states = dict(zip(distinct, encoder.encode(encoder.tokenize(distinct)), strict=True))
            try:
                # An empty caption is not in `states` and becomes None, the null caption.
                packed[name] = pack([states.get(caption) for caption in stripped], self.constants[name])
            except ValueError as error:
                raise UserError(
                    f"{encoder.config.llm}: {error}: check the weights, or set text.dtype: fp32"
                ) from error
            if encoder.truncated and name not in self._warned:
                # Once per family: long captions come in every batch.
                self._warned.add(name)
                log.warning("%s: captions longer than max_tokens=%d are cut", name, encoder.config.max_tokens)
        return packed
