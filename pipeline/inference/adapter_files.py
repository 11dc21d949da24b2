"""Files of adapters in an exported folder.

<export>/users/adapter.safetensors            the adapter of users without its table
<export>/users/00003.safetensors              the embedding of user 3, see `pipeline/inference/users.py`
<export>/lora/pytorch_lora_weights.safetensors                    LoRA, as diffusers reads it
<export>/lora/adapter_model.safetensors, adapter_config.json      the same, as peft reads it

Users have numbers here: their names stay in the dataset.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.adapters.config import UsersConfig
from model.adapters.lora import LoRALinear
from model.adapters.users import UserAdapter
from model.common.errors import UserError
from model.common.settings import settings_from
from model.config import DiTConfig
from pipeline.inference.users import save_user, user_adapter

USERS, ADAPTER = "users", "adapter.safetensors"
KIND = "li-dit adapter of users"
LORA, LORA_FILE = "lora", "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, PEFT_PREFIX = "transformer", "base_model.model"
"""Beginnings of the keys in files of LoRA: the network's name in diffusers' pipeline, and in peft's model."""
METADATA = "lora_adapter_metadata"
"""Key of the metadata of diffusers' files that has peft's settings."""
TABLE = "table.weight"


def user_file(number: int) -> str:
    """Return the name of a user's file."""
    return f"{number:05d}.safetensors"


def save_adapters(folder: Path, network: nn.Module) -> None:
    """Write the files of a network's adapters, if it has any."""
    adapter = user_adapter(network)
    if adapter is not None:
        save_user_adapter(folder / USERS / ADAPTER, adapter)
        rows = adapter.table.weight.detach().float()
        for number, row in enumerate(rows):
            # A deleted user's row is zero.
            if row.any():
                save_user(folder / USERS / user_file(number), row.view(adapter.config.tokens, -1))
    save_lora(folder / LORA, network)


def save_user_adapter(path: Path, adapter: UserAdapter) -> None:
    """Write the adapter without its table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in adapter.state_dict().items() if name != TABLE}
    save_file(tensors, path, {"kind": KIND, "config": json.dumps(asdict(adapter.config))})
    path.chmod(0o644)


def load_user_adapter(path: Path, sizes: DiTConfig) -> UserAdapter:
    """Read an adapter of users, with a table of one row of zeros.

    Args:
        path: its file.
        sizes: of the network that it is for.

    Raises:
        UserError: if the file is missing, damaged, another kind of file, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise UserError(f"{path} is not an adapter of users: name one that pipeline.export wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = settings_from(UsersConfig, json.loads(metadata["config"]), f"{path}: config")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: {error}: export the run again") from error

    adapter = UserAdapter(sizes, replace(config, count=1))
    tensors[TABLE] = torch.zeros_like(adapter.table.weight)
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: of another network than the one that it is loaded into: {error}") from error
    return adapter.requires_grad_(False).eval()


def lora_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's LoRA by the names of parameters, with its scale in `lora_B`, so that alpha is the
    rank."""
    weights = {}
    for path, layer in network.named_modules():
        if isinstance(layer, LoRALinear):
            weights[f"{path}.lora_A.weight"] = layer.lora_A.weight.detach().contiguous()
            weights[f"{path}.lora_B.weight"] = (layer.lora_B.weight * layer.scale).detach()
    return weights


def read_lora(folder: Path) -> dict[str, Tensor]:
    """Return the LoRA of an export's folder `lora` as `lora_weights` does; empty if there is none.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / LORA_FILE
    try:
        weights = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}: export the run again") from error
    return {name.removeprefix(f"{PREFIX}."): value for name, value in weights.items()}


def save_lora(folder: Path, network: nn.Module) -> None:
    """Write a network's LoRA, if it has any."""
    weights = lora_weights(network)
    if not weights:
        return

    folder.mkdir(parents=True, exist_ok=True)
    rank = next(value.shape[0] for name, value in weights.items() if ".lora_A." in name)
    layers = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    # A pattern for whole names: by their ends, layers of the refiners would match too.
    targets = "|".join(map(re.escape, layers))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    # Of single layers there are none, which diffusers does not take for granted.
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    of_network = json.dumps({f"{PREFIX}.{key}": value for key, value in config.items()})
    for file, prefix in ((LORA_FILE, PREFIX), (PEFT_FILE, PEFT_PREFIX)):
        named = {f"{prefix}.{name}": value for name, value in weights.items()}
        save_file(named, folder / file, {"format": "pt", METADATA: of_network})
        (folder / file).chmod(0o644)
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
