"""Users in sampling: from a name, a number or a file to what the network reads; and files of single users."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.adapters.users import UserAdapter
from model.common.errors import UserError
from model.common.files import atomic_path
from model.condition import Users

KIND, TOKENS = "li-dit user", "tokens"
"""Metadata `kind` of a user's file, and its only tensor, fp32 [L, R]."""
MAX_CHOICES = 1000
"""Users in a list to choose from."""


def save_user(path: Path, tokens: Tensor, **about: Any) -> None:
    """Write a user's embedding fp32 [L, R] as a safetensors file, with facts about it as metadata."""
    metadata = {"kind": KIND, **{key: json.dumps(value) for key, value in about.items()}}
    with atomic_path(path) as temporary:
        save_file({TOKENS: tokens.detach().float().cpu().contiguous()}, temporary, metadata)
        temporary.chmod(0o644)


def read_user(path: Path) -> Tensor:
    """Read the embedding fp32 [L, R] of a user's file.

    Raises:
        UserError: if the file is missing, damaged, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("kind") != KIND:
                raise UserError(f"{path} is not a user's file: name one that pipeline.fit_user wrote")
            return file.get_tensor(TOKENS).float()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}: name a user's file") from error


def user_adapter(network: nn.Module) -> UserAdapter | None:
    """Return a network's adapter of users, if it has one."""
    adapters: Any = network.adapters
    return dict(adapters.items()).get("users")


@dataclass
class UserFinder:
    """Finds the users that sampling asks for."""

    network: nn.Module
    number_of: Callable[[str], int] | None = None
    """Finds the number of a name; None = names are not known here."""
    folder: Path | None = None
    """An export's folder of users, whose files are found by their numbers."""
    list_names: Callable[[], Sequence[str | None]] | None = None
    """Lists the names by number, None where there is no such user any more; None = names are not known."""

    def choices(self) -> list[str]:
        """Return the users that can be chosen, at most `MAX_CHOICES`: by name, else by number."""
        adapter = user_adapter(self.network)
        if adapter is None:
            return []
        if self.folder is not None:
            files = (path.stem for path in self.folder.glob("*.safetensors") if path.stem.isdigit())
            return [str(int(stem)) for stem in sorted(files)][:MAX_CHOICES]
        names = self.list_names() if self.list_names is not None else []
        known = [name for name in names[: adapter.config.count] if name is not None]
        return (known or [str(number) for number in range(adapter.config.count)])[:MAX_CHOICES]

    def without_name(self, user: str) -> str:
        """Return a user as records have it: the number of a name; a number, a file and "" as they are.

        Raises:
            UserError: if the name is unknown.
        """
        if not user or user.endswith(".safetensors") or user_adapter(self.network) is None:
            return user
        return str(self._number(user))

    def find(self, user: str, images: int, device: torch.device) -> Users | None:
        """Return a user for each of the images; None for "".

        Args:
            user: path of a user's file, a number, or a name.
            images: their number.
            device: of the network.

        Raises:
            UserError: if the network has no users, or not this one.
        """
        if not user:
            return None
        adapter = user_adapter(self.network)
        if adapter is None:
            raise UserError(f"--user {user}: the network has no users: train some with users.count")

        ids = torch.zeros(images, dtype=torch.int64, device=device)
        if self.folder is not None and user.isascii() and user.isdigit():
            user = str(self.folder / f"{int(user):05d}.safetensors")
        if user.endswith(".safetensors"):
            tokens = check_tokens(adapter, read_user(Path(user)), user)
            return Users(ids, tokens.to(device).expand(images, -1, -1))
        number = self._number(user)
        if not 0 <= number < adapter.config.count:
            raise UserError(
                f"--user {user}: the table has users 0 to {adapter.config.count - 1}: give one of them"
            )
        row = adapter.table.weight[number : number + 1]
        # A partitioned table is empty outside of a forward pass.
        if row.numel() and not row.any():
            raise UserError(f"--user {user}: that user was deleted: give another one")
        return Users(ids + number)

    def _number(self, user: str) -> int:
        if user.isascii() and user.isdigit():
            return int(user)
        if self.number_of is None:
            raise UserError(f"--user {user}: there are no names here: give a number or a user's file")
        return self.number_of(user)


def check_tokens(adapter: UserAdapter, tokens: Tensor, name: str) -> Tensor:
    """Return a user's embedding [L, R] if it fits the adapter.

    Raises:
        UserError: if it does not.
    """
    shape = (adapter.config.tokens, adapter.config.width)
    if tuple(tokens.shape) != shape:
        raise UserError(
            f"{name}: an embedding of shape {tuple(tokens.shape)}, the adapter reads {shape}: "
            "use the run that it was made with"
        )
    return tokens
