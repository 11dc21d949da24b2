"""Adapters of the diffusers pipeline: a user, and LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.common.errors import UserError
from model.common.extras import require
from model.condition import Users
from pipeline.inference.adapter_files import ADAPTER, LORA_FILE, PREFIX, load_user_adapter
from pipeline.inference.users import check_tokens, read_user, user_adapter


class AdapterLoading:
    """The part of a diffusers pipeline that loads adapters."""

    transformer: Any

    _user: Tensor | None = None

    def load_user(self, path: str | Path, adapter: str | Path | None = None) -> None:
        """Generate for a user from now on, in place of the one before.

        Args:
            path: the user's file.
            adapter: file of the adapter of users; None = the one beside the user's file. It is read once.

        Raises:
            UserError: if a file is missing, damaged, or of another network.
        """
        path = Path(path)
        tokens = read_user(path)
        loaded = user_adapter(self.transformer)
        if loaded is None or adapter is not None:
            found = Path(adapter) if adapter is not None else path.parent / ADAPTER
            if not found.is_file():
                raise UserError(f"{found}: not there: give adapter=, the export's users/{ADAPTER}")
            loaded = load_user_adapter(found, self.transformer.sizes)
            self.transformer.adapters["users"] = loaded.to(self.transformer.device, self.transformer.dtype)
        self._user = check_tokens(loaded, tokens, str(path))

    def unload_user(self) -> None:
        """Generate for nobody again, which is the network without the adapter."""
        self._user = None
        if "users" in self.transformer.adapters:
            del self.transformer.adapters["users"]

    def find_users(self, images: int, device: torch.device) -> Users | None:
        """Return the loaded user for each of the images; None if none is loaded."""
        if self._user is None:
            return None
        ids = torch.zeros(images, dtype=torch.int64, device=device)
        return Users(ids, self._user.to(device).expand(images, -1, -1))

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
    ) -> None:
        """Load LoRA by peft; diffusers' other functions of adapters work on it then.

        Args:
            source: an export's folder `lora`, a file, or tensors by the keys of such a file.
            adapter_name: name under which diffusers' functions find it.
            weight_name: name of the file in the folder.

        Raises:
            UserError: if peft is not installed, there is no such file, or it has no LoRA of the network.
        """
        require("lora", "peft")
        where: Any = {"pretrained_model_name_or_path_or_dict": source}
        if isinstance(source, Mapping):
            name, keys = "the tensors", list(source)
        else:
            path = Path(source)
            if not path.is_file():
                path = path / (weight_name or LORA_FILE)
            name, keys = str(path), _keys(path)
            where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
        # Of another network or format, diffusers would load nothing and only warn.
        if not any(key.startswith(f"{PREFIX}.") for key in keys):
            raise UserError(f"{name}: no key begins with `{PREFIX}.`: name an export's lora/{LORA_FILE}")
        self.transformer.load_lora_adapter(**where, prefix=PREFIX, adapter_name=adapter_name)

    def unload_lora_weights(self) -> None:
        """Remove all LoRA.

        Raises:
            UserError: if peft is not installed.
        """
        require("lora", "peft")
        self.transformer.unload_lora()


def _keys(path: Path) -> list[str]:
    """Return the names of a file's tensors.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: not there: name an export's folder `lora`")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}: name another file") from error
