"""Low-rank additions to linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters.config import LoRAConfig
from model.common.errors import UserError
from model.dit import LIDiT
from model.functional import product_dtype
from model.layers import Linear


class _Down(nn.Linear):
    """From the layer's input to the rank, without bias."""

    def reset_parameters(self) -> None:
        """Set the starting values: Kaiming-uniform, as in the paper's code and in peft."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class _Up(nn.Linear):
    """From the rank to the layer's output, without bias; it starts at zero, so that nothing changes."""

    def reset_parameters(self) -> None:
        """Set the starting values."""
        nn.init.zeros_(self.weight)


class LoRALinear(Linear):
    """A linear layer with a low-rank addition: W x + b + scale B A x.

    It takes over the parameters of the layer that it replaces, under the same names.
    """

    def __init__(self, layer: Linear, rank: int, scale: float) -> None:
        """Take over a layer.

        Args:
            layer: the layer.
            rank: of the addition.
            scale: factor of the addition.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, scale
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = _Down(self.in_features, rank, bias=False)
        self.lora_B = _Up(rank, self.out_features, bias=False)

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """Map the last axis of the input; `shift` is added to the bias."""
        kind = product_dtype(input)
        low = F.linear(input.to(kind), self.lora_A.weight.to(kind))
        addition = F.linear(low, self.lora_B.weight.to(kind)).to(input.dtype)
        return super().forward(input, shift) + self.scale * addition


def attach_lora(network: LIDiT, config: LoRAConfig) -> None:
    """Give the linear layers of the blocks that the settings name an addition.

    Raises:
        UserError: if a name is that of no layer.
    """
    scale, found = config.alpha / config.rank, set()
    for path, layer in list(network.blocks.named_modules()):
        name = path.rpartition(".")[2]
        if name in config.targets and isinstance(layer, Linear):
            found.add(name)
            _replace(network.blocks, path, LoRALinear(layer, config.rank, scale))
    if missing := [name for name in config.targets if name not in found]:
        raise UserError(
            f"lora.targets names {missing[0]}, and the blocks have no such linear layer: "
            "name layers such as query_key_value"
        )


def attach_lora_as_in(network: LIDiT, weights: Mapping[str, Tensor]) -> LIDiT:
    """Give those linear layers an addition that have one in `weights`, by names of parameters, with the scale
    1; return the network, whose additions have their starting weights.

    Raises:
        UserError: if the network has no such layer.
    """
    for name, value in weights.items():
        path, _, rest = name.partition(".lora_A.")
        if not rest:
            continue
        layer = dict(network.named_modules()).get(path)
        if not isinstance(layer, Linear):
            raise UserError(
                f"LoRA of {path}: this network has no such linear layer: give that of the same one"
            )
        _replace(network, path, LoRALinear(layer, value.shape[0], 1.0))
    return network


def _replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)
