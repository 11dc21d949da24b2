"""A transformers model from a GGUF file, with the blocks that are run and no others."""

from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from model.common.errors import UserError
from model.encoders.gguf import GGUFFile

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture -> transformers' model type, for architectures whose metadata is complete."""


def build_model(file: GGUFFile, blocks: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build the base model, without LM head, with the first `blocks` blocks.

    Args:
        file: the file.
        blocks: number of blocks; only their weights are dequantized.
        dtype: type of the weights.
        device: where they are loaded.

    Raises:
        UserError: if the architecture is not supported, its rotary scaling is not fully described by GGUF, or
            weights are missing from the file.
    """
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{file.path}: GGUF of {file.architecture!r} is not supported ({known} are): use its safetensors"
        )
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UserError(
            f"{file.path}: scaled rotary embedding is not read from GGUF: use the model's safetensors"
        )

    settings = _settings(file) | {"num_hidden_layers": blocks}
    # Weights are assigned below, so random ones need not be made; buffers (rotary frequencies) are computed.
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(AutoConfig.for_model(ARCHITECTURES[file.architecture], **settings))

    # Weights have other names in GGUF, and for some architectures another layout, which `processor` undoes.
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = TensorNameMap(architecture, blocks)
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=settings)
    state: dict[str, Tensor] = {}
    for parameter in model.state_dict():
        module, _, leaf = parameter.rpartition(".")
        tensor = f"{names.get_name('model.' + module)}.{leaf}"
        if tensor not in file.tensors:
            raise UserError(
                f"{file.path}: no tensor for {parameter} ({tensor}): the file does not contain a whole model"
            )
        weights = processor.process(weights=file.tensor(tensor).numpy(), name=tensor).weights
        state[parameter] = torch.from_numpy(np.ascontiguousarray(weights)).to(device, dtype)

    model.load_state_dict(state, assign=True)
    return model.to(device)


def _settings(file: GGUFFile) -> dict[str, Any]:
    """Return the arguments of the transformers config that the metadata gives."""
    names = GGUF_CONFIG_MAPPING[file.architecture]
    settings: dict[str, Any] = {}
    for key, value in file.metadata.items():
        name = names.get(key.removeprefix(file.architecture + "."))
        # None or -1 marks what transformers ignores.
        if name and name != -1:
            settings[name] = value
    # The vocabulary's size is optional in the metadata.
    settings["vocab_size"] = len(file.metadata["tokenizer.ggml.tokens"])
    settings["pad_token_id"] = None
    return settings
