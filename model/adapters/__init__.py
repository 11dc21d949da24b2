"""Adapters of a frozen network: an embedding per user, and LoRA."""

from model.adapters import users  # noqa: F401 - registers its class
from model.adapters.attach import attach_adapters
from model.adapters.config import LoRAConfig, UsersConfig

__all__ = ["LoRAConfig", "UsersConfig", "attach_adapters"]
