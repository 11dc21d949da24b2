"""Kinds of frozen text encoders: how transformers loads each, and where its blocks are.

Another kind is a class of `ENCODERS`; `text.encoder` names it, in a program that imports the file.
"""

from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import (
    AutoModel,
    CLIPTextModel,
    MT5EncoderModel,
    PreTrainedModel,
    T5EncoderModel,
    UMT5EncoderModel,
)

from model.common.errors import UserError
from model.common.registry import Registry


class EncoderKind:
    """A kind of text encoder, read from a folder of safetensors."""

    causal: ClassVar[bool] = False
    """True if no state depends on a later token, so that the prefix can be run once for all captions."""
    blocks: ClassVar[tuple[tuple[str, str], ...]]
    """Submodule and attribute in which the list of blocks can be; the first that exists counts."""

    @classmethod
    def load(cls, name: str, settings: Any, folder: Path, **loading: Any) -> PreTrainedModel:
        """Load the base model.

        Args:
            name: the encoder's name in the settings, for messages.
            settings: transformers' configuration of it.
            folder: its files.
            loading: arguments of `from_pretrained`, which keep transformers from reading pickles.

        Raises:
            UserError: if the files are those of another kind of model.
        """
        raise NotImplementedError

    @classmethod
    def find_blocks(cls, module: PreTrainedModel) -> tuple[nn.Module, str]:
        """Return the submodule that contains the blocks, and the name of its attribute.

        Raises:
            UserError: if there is no such list.
        """
        for path, name in cls.blocks:
            try:
                owner = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                return owner, name
        raise UserError(
            f"{type(module).__name__}: unknown architecture, its blocks were not found: "
            f"use one of text.encoder={', '.join(sorted(ENCODERS))}"
        )

    @classmethod
    def block_list(cls, module: PreTrainedModel) -> nn.ModuleList:
        """Return the transformer blocks of a base model."""
        owner, name = cls.find_blocks(module)
        return getattr(owner, name)


ENCODERS: Registry[type[EncoderKind]] = Registry("text.encoder")


@ENCODERS.register("causal")
class CausalEncoder(EncoderKind):
    """A decoder-only LLM, also as the language model of a multimodal one."""

    causal = True
    blocks = (("", "layers"), ("", "h"))  # the second is GPT-2's

    @classmethod
    def load(cls, name: str, settings: Any, folder: Path, **loading: Any) -> PreTrainedModel:
        """Load the decoder; a vision tower is left out."""
        if settings.is_encoder_decoder:
            raise UserError(f"{name}: an encoder-decoder, not a causal LLM: set text.encoder: t5")

        module = AutoModel.from_pretrained(folder, trust_remote_code=False, **loading)
        if getattr(settings.get_text_config(), "attn_logit_softcapping", None):
            # transformers' SDPA silently ignores the cap.
            module.set_attn_implementation("eager")
        # A multimodal checkpoint also has a vision tower, which is not needed.
        language_model = getattr(module, "language_model", None)
        return module if language_model is None else language_model


@ENCODERS.register("t5")
class T5Encoder(EncoderKind):
    """The encoder half of a T5."""

    blocks = (("encoder", "block"),)
    _CLASSES: ClassVar = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}

    @classmethod
    def load(cls, name: str, settings: Any, folder: Path, **loading: Any) -> PreTrainedModel:
        """Load T5, mT5 or UMT5 without its decoder."""
        if settings.model_type not in cls._CLASSES:
            raise UserError(f"{name}: a {settings.model_type} model is not a T5: check text.encoder")
        return cls._CLASSES[settings.model_type].from_pretrained(folder, **loading)


@ENCODERS.register("clip")
class CLIPEncoder(EncoderKind):
    """CLIP's text model."""

    blocks = (("text_model.encoder", "layers"), ("encoder", "layers"))

    @classmethod
    def load(cls, name: str, settings: Any, folder: Path, **loading: Any) -> PreTrainedModel:
        """Load the text half of a CLIP."""
        return CLIPTextModel.from_pretrained(folder, **loading)
