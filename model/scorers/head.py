"""Small heads on CLIP embeddings, such as LAION's aesthetic predictor: linear layers one after the other."""

import re
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from model.common.errors import UserError, first_line

MAX_BYTES = 256 << 20


class EmbeddingHead:
    """Linear layers from an embedding to one number, read from safetensors.

    The layers are the two-dimensional tensors `NAME.weight` in the order of the numbers in their names, as
    PyTorch names those of an `nn.Sequential`, each with its `NAME.bias`. LAION's aesthetic predictor has five
    of them and no activation in between.
    """

    def __init__(self, weights: str, activation: str, output: str, device: torch.device) -> None:
        """Read the weights.

        Args:
            weights: the safetensors file.
            activation: `none` or `relu`, between the layers.
            output: `none` or `sigmoid`, after the last one.
            device: where it runs.

        Raises:
            UserError: if the file cannot be read, or holds something else.
        """
        path = Path(weights)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{weights}: more than {MAX_BYTES:,} bytes: this is no head of an embedding")
            data = path.read_bytes()
            tensors = load(data)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"{weights}: no head can be read from it ({first_line(error)}): give a safetensors file"
            ) from error

        names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        self.layers: list[tuple[Tensor, Tensor]] = []
        for name in sorted(names, key=_numbers):
            weight = tensors[f"{name}.weight"].float()
            bias = tensors.get(f"{name}.bias", torch.zeros(len(weight))).float()
            fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
            if not fits or (self.layers and self.layers[-1][0].shape[0] != weight.shape[1]):
                raise UserError(
                    f"{weights}: {name} does not follow the layer before: give linear layers only"
                )
            self.layers.append((weight.to(device), bias.to(device)))
        if not self.layers or self.layers[-1][0].shape[0] != 1:
            raise UserError(f"{weights}: does not end with one number: give the head of a predictor")
        self._relu, self._sigmoid = activation == "relu", output == "sigmoid"
        self.identity = {"xxh64": xxhash.xxh64_hexdigest(data), "activation": activation, "output": output}

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return a number per embedding, [B].

        Args:
            embeddings: unit vectors [B, C].

        Raises:
            UserError: if they have another width than the head.
        """
        width = self.layers[0][0].shape[1]
        if embeddings.shape[-1] != width:
            raise UserError(
                f"a head for embeddings of {width} numbers got {embeddings.shape[-1]}: it belongs to another "
                "CLIP, correct annotations.model or the head's weights"
            )
        values = embeddings.float()
        for number, (weight, bias) in enumerate(self.layers):
            values = torch.nn.functional.linear(
                values.relu() if number and self._relu else values, weight, bias
            )
        values = values[:, 0]

        return values.sigmoid() if self._sigmoid else values


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
