"""Loading a frozen language model: from a folder, the hub or a GGUF file, cut to the blocks that are read.

Weights come from safetensors or GGUF alone, never from pickles; code that ships with a checkpoint is never run; a hub
model needs a commit hash, so that a family's name stands for one set of numbers.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    UMT5EncoderModel,
)

from model.common.errors import UserError, first_line
from model.common.hub import download, fingerprint, is_commit
from model.config import TextConfig
from model.encoders.gguf import GGUFFile, build_model, count_blocks, file_sha256, find_gguf
from model.encoders.gguf_tokenizer import build_tokenizer
from model.encoders.packed_attention import packed_attention

PACKED = "li_dit_packed"
Reading = Literal["one", "concat", "norm_mean"]
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_OTHER_FILES = ["*/*", "consolidated*"]
"""The same weights once more, for other programs."""

AttentionInterface.register(PACKED, packed_attention)


@dataclass
class LanguageModel:
    """A frozen encoder and all that is needed to read its states."""

    module: PreTrainedModel
    """Base model: embeddings and the first `blocks_run` blocks."""
    tokenizer: Tokenizer
    pad: int | None
    fingerprint: str
    """Stands for weights and tokenizer."""
    hidden: int
    blocks: int
    """Blocks that the whole model has."""
    reading: Reading
    layers_read: list[int]
    """Indices into transformers' `hidden_states`: i = output of the i-th block; the last = after the final norm."""

    @property
    def blocks_run(self) -> int:
        """Blocks up to the highest one read."""
        return max(self.layers_read)

    @property
    def added_tokens(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer adds by itself before and after a text."""
        alone = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        start = next(at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        return whole[:start], whole[start + len(alone) :]

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Attention over packed captions inside, the model's own outside."""
        before = self.module.config._attn_implementation
        self.module.config._attn_implementation = PACKED
        try:
            yield
        finally:
            self.module.config._attn_implementation = before

    def states(self, **inputs: Any) -> Tensor:
        """Run the model and read its layers: [B, T, W]."""
        read: dict[int, Tensor] = {}

        def keep(index: int, output: Any) -> None:
            state = output if isinstance(output, Tensor) else output[0]
            if self.reading != "norm_mean":
                read[index] = state
            elif 0 not in read:
                read[0] = _normalize(state)
            else:
                read[0] += _normalize(state).to(read[0].device)

        blocks = list_blocks(self.module)
        inner = [index for index in self.layers_read if index < self.blocks]
        hooks = [
            blocks[index - 1].register_forward_hook(lambda _module, _inputs, output, index=index: keep(index, output))
            for index in inner
        ]
        try:
            output = self.module(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if self.blocks in self.layers_read:
            keep(self.blocks, output.last_hidden_state)
        if self.reading == "norm_mean":
            return (read[0] / len(self.layers_read)).to(output.last_hidden_state.dtype)
        device = output.last_hidden_state.device
        states = [read[index].to(device) for index in self.layers_read]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def _normalize(state: Tensor) -> Tensor:
    """Layer normalisation over channels, without weights, in fp32."""
    return F.layer_norm(state.float(), state.shape[-1:])


def load_language_model(config: TextConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Load the model that `config.llm` names.

    Raises:
        UserError: it cannot be found or read; the message says why.
    """
    path = find_gguf(config.llm)
    model = _from_folder(config, dtype, device) if path is None else _from_gguf(config, path, dtype, device)
    model.module.requires_grad_(False).eval()
    return model


def parse_layer(layer: str, blocks: int) -> tuple[Reading, list[int]]:
    """`-3`, `10,20,30` or `norm_mean` -> how to read, and indices 1..blocks into `hidden_states`.

    Raises:
        UserError: it is none of these, or a layer that the model does not have.
    """
    if layer == "norm_mean":
        return "norm_mean", list(range(1, blocks + 1))
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", layer):
        raise UserError(f"text.layer={layer!r}: give an index such as -3, a list such as 10,20,30, or norm_mean")
    numbers = [int(part) for part in layer.split(",")]
    indices = [number if number > 0 else number + blocks + 1 for number in numbers]
    for number, index in zip(numbers, indices, strict=True):
        if not 1 <= index <= blocks or number == 0:
            raise UserError(f"text.layer={layer}: the model has {blocks} blocks: use 1 to {blocks}, or -{blocks} to -1")
    return "one" if len(indices) == 1 else "concat", indices


def _from_gguf(config: TextConfig, path: Path, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    if config.encoder != "causal":
        raise UserError(f"{config.llm}: GGUF files are read as causal LLMs only: give encoder={config.encoder} a model folder")
    if config.device_map:
        raise UserError(f"{config.llm}: a GGUF file is read to one device: leave device_map out, or give a model folder")
    file = GGUFFile(path)
    blocks = count_blocks(file)
    reading, layers = parse_layer(config.layer, blocks)
    module = build_model(file, max(layers), dtype, device)
    pad = file.metadata.get("tokenizer.ggml.padding_token_id")
    tokenizer = build_tokenizer(file)
    hidden = module.config.hidden_size
    return LanguageModel(module, tokenizer, pad, f"sha256:{file_sha256(path)}", hidden, blocks, reading, layers)


def _from_folder(config: TextConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    folder, weights = _find_folder(config)
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        module = _load_module(config, settings, folder, dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{config.llm}: transformers cannot load it: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{config.llm}: no fast tokenizer: add its tokenizer.json to the folder")
    if not config.device_map:
        module.to(device)  # pyright: ignore[reportArgumentType]
    text = settings.get_text_config()
    owner, name = _blocks_owner(module)
    blocks = len(getattr(owner, name))
    reading, layers = parse_layer(config.layer, blocks)
    setattr(owner, name, getattr(owner, name)[: max(layers)])
    longest = getattr(text, "max_position_embeddings", None)
    if longest and config.max_tokens > longest:
        raise UserError(f"{config.llm}: reads at most {longest} tokens: set text.max_tokens lower than {config.max_tokens}")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pad = tokenizer.convert_tokens_to_ids(tokenizer.pad_token) if tokenizer.pad_token else None
    assert pad is None or isinstance(pad, int)
    return LanguageModel(module, backend, pad, weights, text.hidden_size, blocks, reading, layers)


def _load_module(config: TextConfig, settings: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    loading = {"dtype": dtype, "use_safetensors": True, "device_map": config.device_map, "trust_remote_code": False}
    if config.encoder == "clip":
        return CLIPTextModel.from_pretrained(folder, **{**loading, "trust_remote_code": None})
    if config.encoder == "t5":
        classes = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
        if settings.model_type not in classes:
            raise UserError(f"{config.llm}: a {settings.model_type} model is no T5: check text.encoder")
        return classes[settings.model_type].from_pretrained(folder, **{**loading, "trust_remote_code": None})
    if settings.is_encoder_decoder:
        raise UserError(f"{config.llm}: an encoder-decoder, not a causal LLM: set text.encoder: t5")
    module = AutoModel.from_pretrained(folder, **loading)
    if getattr(settings.get_text_config(), "attn_logit_softcapping", None):
        module.set_attn_implementation("eager")  # transformers' sdpa leaves the cap out without a word
    # A multimodal checkpoint holds the language model beside the vision tower, which is dropped here.
    inner = getattr(module, "language_model", None)
    return module if inner is None else inner


def _find_folder(config: TextConfig) -> tuple[Path, str]:
    """The model's files on this machine, and what stands for their content."""
    folder = Path(config.llm)
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
            found = f"{pickled[0].name} is pickled" if pickled else "no weights"
            raise UserError(f"{config.llm}: {found}: only safetensors are read, so convert the weights to it")
        return folder, fingerprint(folder, weights)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.llm) or config.llm.startswith("."):
        raise UserError(f"text.llm={config.llm!r}: no such folder: give a folder, a hub name, a .gguf file or package:NAME")
    if not is_commit(config.revision):
        raise UserError(f"{config.llm}: a hub name needs text.revision: its 40-digit commit hash")
    folder = download(config.llm, config.llm, config.revision, _FILES, ignore=_OTHER_FILES)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{config.llm}: revision {config.revision} has no safetensors: take a revision or a copy that has them")
    return folder, f"commit:{config.revision}"


def list_blocks(module: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a base model."""
    owner, name = _blocks_owner(module)
    return getattr(owner, name)


def _blocks_owner(module: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the blocks, and under which name: decoders, then CLIP's text model, then T5's encoder."""
    for path, name in (("", "layers"), ("text_model.encoder", "layers"), ("encoder", "block"), ("", "h")):
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise UserError(f"{type(module).__name__}: where its blocks are is not known: use a decoder-only LLM, T5 or CLIP")
