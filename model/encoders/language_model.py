"""Loading a frozen language model from a folder, the hub or a GGUF file, with only the blocks that are read.

Weights are read from safetensors or GGUF only, never from pickles. Code in a checkpoint's repository is never
run. A hub model needs a commit hash, so that a family always means the same numbers.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from model.common.errors import UserError, first_line
from model.common.hub import download, fingerprint, is_commit
from model.config import TextConfig
from model.encoders.encoder_kinds import ENCODERS, EncoderKind
from model.encoders.gguf import GGUFFile, count_blocks, file_sha256, find_gguf
from model.encoders.gguf_model import build_model
from model.encoders.gguf_tokenizer import build_tokenizer
from model.encoders.packed_attention import packed_attention

PACKED = "li_dit_packed"
Reading = Literal["one", "concat", "norm_mean"]
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
_OTHER_FILES = ["*/*", "consolidated*"]
"""Copies of the same weights for other programs, which are not downloaded."""
_PICKLES = ("*.bin", "*.pt", "*.pth")

AttentionInterface.register(PACKED, packed_attention)


@dataclass
class LanguageModel:
    """A frozen encoder, with everything that is needed to read its hidden states."""

    module: PreTrainedModel
    """Base model: embeddings and the first `blocks_run` blocks."""
    kind: type[EncoderKind]
    tokenizer: Tokenizer
    pad: int | None
    """Padding token."""
    fingerprint: str
    """Identifies weights and tokenizer."""
    hidden: int
    """Channels of one layer's hidden states."""
    blocks: int
    """Blocks of the whole model."""
    reading: Reading
    layers_read: list[int]
    """Indices into transformers' `hidden_states`: i = output of block i; the last is after the final norm."""

    @property
    def block_list(self) -> nn.ModuleList:
        """The blocks that were loaded."""
        return self.kind.block_list(self.module)

    @property
    def blocks_run(self) -> int:
        """Number of blocks up to the highest one that is read."""
        return max(self.layers_read)

    @property
    def added_tokens(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer itself adds before and after a text."""
        # The post-processor's template cannot be read, so an example shows what it adds.
        text = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        start = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
        return whole[:start], whole[start + len(text) :]

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Use attention over packed captions inside the context."""
        # transformers reads this name in every forward pass.
        before = self.module.config._attn_implementation
        self.module.config._attn_implementation = PACKED
        try:
            yield
        finally:
            self.module.config._attn_implementation = before

    def states(self, **inputs: Any) -> Tensor:
        """Run the model on the arguments of its forward pass; return the hidden states read, [B, T, W]."""
        if self.reading == "norm_mean":
            return self._mean_states(inputs)

        states: dict[int, Tensor] = {}
        last = self._run(inputs, states.__setitem__)
        # With a device map, layers are on several devices.
        layers = [states[index].to(last.device) for index in self.layers_read]
        return layers[0] if len(layers) == 1 else torch.cat(layers, dim=-1)

    def _mean_states(self, inputs: dict[str, Any]) -> Tensor:
        """Return the mean of the layers, each normalized over channels in fp32."""
        # Layers are added while the model runs, so that only one is in memory.
        total: Tensor | None = None

        def add(_: int, states: Tensor) -> None:
            nonlocal total
            normalized = F.layer_norm(states.float(), states.shape[-1:])
            total = normalized if total is None else total.add_(normalized.to(total.device))

        last = self._run(inputs, add)
        assert total is not None
        return (total / len(self.layers_read)).to(last.dtype)

    def _run(self, inputs: dict[str, Any], read: Callable[[int, Tensor], None]) -> Tensor:
        """Run the model, call `read(index, states)` for each layer read, and return the last states."""

        def hook(index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
            # Blocks return a tensor or a tuple, depending on architecture and version of transformers.
            read(index, output if isinstance(output, Tensor) else output[0])

        blocks = self.block_list
        # `output_hidden_states=True` would keep the states of all layers.
        hooks = []
        for index in self.layers_read:
            if index < self.blocks:
                hooks.append(blocks[index - 1].register_forward_hook(partial(hook, index)))
        try:
            last = self.module(**inputs).last_hidden_state
        finally:
            for handle in hooks:
                handle.remove()

        # The last entry of transformers' `hidden_states` is after the final norm, which is no block's output.
        if self.blocks in self.layers_read:
            read(self.blocks, last)
        return last


def load_language_model(config: TextConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Load the model that `config.llm` names, frozen and in evaluation mode.

    Args:
        config: the family's settings.
        dtype: type of its weights.
        device: where it is loaded, unless `config.device_map` places it.

    Raises:
        UserError: if it cannot be found or read; the message says why.
    """
    path = find_gguf(config.llm)
    model = _from_folder(config, dtype, device) if path is None else _from_gguf(config, path, dtype, device)
    model.module.requires_grad_(False).eval()
    return model


def parse_layer(layer: str, blocks: int) -> tuple[Reading, list[int]]:
    """Read the setting `text.layer`: `-3`, `10,20,30` or `norm_mean`.

    Args:
        layer: the setting.
        blocks: blocks of the model.

    Returns:
        How layers are combined, and indices from 1 to `blocks` into `hidden_states`.

    Raises:
        UserError: if the setting is none of these, or names a layer that the model does not have.
    """
    if layer == "norm_mean":
        return "norm_mean", list(range(1, blocks + 1))

    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", layer):
        raise UserError(
            f"text.layer={layer!r}: give an index such as -3, a list such as 10,20,30, or norm_mean"
        )
    numbers = [int(part) for part in layer.split(",")]
    indices = [number if number > 0 else number + blocks + 1 for number in numbers]
    for number, index in zip(numbers, indices, strict=True):
        if not 1 <= index <= blocks or number == 0:
            raise UserError(
                f"text.layer={layer}: the model has {blocks} blocks: use 1 to {blocks}, or -{blocks} to -1"
            )
    return "one" if len(indices) == 1 else "concat", indices


def _from_gguf(config: TextConfig, path: Path, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    kind = ENCODERS[config.encoder]
    if not kind.causal:
        raise UserError(
            f"{config.llm}: GGUF files are read as causal LLMs only: "
            f"give encoder={config.encoder} a model folder"
        )
    if config.device_map:
        raise UserError(
            f"{config.llm}: a GGUF file is read to one device: leave device_map out, or give a model folder"
        )

    # Only the blocks up to the highest one read are built.
    file = GGUFFile(path)
    try:
        blocks = count_blocks(file)
        reading, layers = parse_layer(config.layer, blocks)
        module = build_model(file, max(layers), dtype, device)
        pad = file.metadata.get("tokenizer.ggml.padding_token_id")
        tokenizer = build_tokenizer(file)
    except UserError:
        raise
    # What the metadata says goes into classes of transformers and tokenizers, whose errors are of any kind.
    except Exception as error:
        raise UserError(
            f"{config.llm}: its metadata do not describe a model ({first_line(error)}): use another file"
        ) from error
    hidden = module.config.hidden_size
    return LanguageModel(
        module, kind, tokenizer, pad, f"sha256:{file_sha256(path)}", hidden, blocks, reading, layers
    )


def _from_folder(config: TextConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    kind = ENCODERS[config.encoder]
    folder, weights = _find_folder(config)
    try:
        # Never a checkpoint's own code: it would run with the rights of the user.
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        # transformers would otherwise fall back to pickles.
        loading = {"dtype": dtype, "use_safetensors": True, "device_map": config.device_map}
        module = kind.load(config.llm, settings, folder, **loading)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{config.llm}: transformers cannot load it: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{config.llm}: no fast tokenizer: add its tokenizer.json to the folder")
    if not config.device_map:
        module.to(device)  # pyright: ignore[reportArgumentType]

    # Blocks above the highest one read are never run.
    owner, name = kind.find_blocks(module)
    blocks = len(getattr(owner, name))
    reading, layers = parse_layer(config.layer, blocks)
    setattr(owner, name, getattr(owner, name)[: max(layers)])

    text = settings.get_text_config()
    max_tokens = getattr(text, "max_position_embeddings", None)
    if max_tokens and config.max_tokens > max_tokens:
        raise UserError(
            f"{config.llm}: reads at most {max_tokens} tokens: "
            f"set text.max_tokens lower than {config.max_tokens}"
        )

    # The encoder truncates and pads by itself.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pad = tokenizer.convert_tokens_to_ids(tokenizer.pad_token) if tokenizer.pad_token else None
    assert pad is None or isinstance(pad, int)
    return LanguageModel(module, kind, backend, pad, weights, text.hidden_size, blocks, reading, layers)


def _find_folder(config: TextConfig) -> tuple[Path, str]:
    """Return the folder of the model's files on this machine, and a text that identifies their content."""
    folder = Path(config.llm)
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            pickled = [path for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
            problem = f"{pickled[0].name} is pickled" if pickled else "no weights"
            raise UserError(
                f"{config.llm}: {problem}: only safetensors are read, so convert the weights to it"
            )
        return folder, fingerprint(folder, weights)

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.llm) or config.llm.startswith("."):
        raise UserError(
            f"text.llm={config.llm!r}: no such folder: "
            "give a folder, a hub name, a .gguf file or package:NAME"
        )
    if not is_commit(config.revision):
        raise UserError(f"{config.llm}: a hub name needs text.revision: its 40-digit commit hash")

    folder = download(config.llm, config.llm, config.revision, _FILES, ignore=_OTHER_FILES)
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{config.llm}: revision {config.revision} has no safetensors: "
            "take a revision or a copy that has them"
        )
    return folder, f"commit:{config.revision}"
