"""Attaching adapters to a network."""

from model.adapter import ADAPTERS
from model.adapters.config import LoRAConfig, UsersConfig
from model.adapters.lora import attach_lora
from model.dit import LIDiT


def attach_adapters(network: LIDiT, users: UsersConfig, lora: LoRAConfig) -> LIDiT:
    """Attach the adapters that the settings ask for, with their starting weights; return the network.

    Raises:
        UserError: if the settings do not fit the network.
    """
    if users.count:
        network.adapters["users"] = ADAPTERS["users"](network.sizes, users)  # type: ignore[call-arg]
    if lora.rank:
        attach_lora(network, lora)
    return network
