"""A network to sample with under ZeRO-3, without gradients and without an optimizer."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.engine.master_weights import check_names
from pipeline.engine.partitioned import build_partitioned
from pipeline.engine.settings import cast_parameters, deepspeed_config
from pipeline.stage.config import EngineConfig, StageConfig


class PartitionedNetwork:
    """A network to sample with under ZeRO-3: each rank holds a part of every parameter.

    The ranks have to run `module` equally often, since each forward pass gathers parameters from all of them.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        settings: EngineConfig,
    ) -> None:
        """Build the network partitioned, in the process group that `join_process_group` made.

        Args:
            build: makes the network.
            weights: the weights by name; read one after another, so the mapping may read lazily.
            dtype: the type in which the network computes.
            settings: settings of ZeRO-3; stage, precision and `hpz` are not used.

        Raises:
            UserError: if the weights are those of another network.
        """
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        # hpz keeps a second copy of the weights on each node, which pays off only in a backward pass.
        stage = StageConfig(engine=replace(settings, zero_stage=3, precision=precision, hpz=1))
        config = deepspeed_config(stage, 1, 1)
        self.module: Any = build_partitioned(build, config).requires_grad_(False)
        cast_parameters(self.module, dtype)

        parameters: dict[str, Any] = dict(self.module.named_parameters())
        wanted = {name: tuple(parameter.ds_shape) for name, parameter in parameters.items()}
        shapes = getattr(weights, "shapes", None) or {
            name: tuple(value.shape) for name, value in weights.items()
        }
        check_names(wanted, shapes, "weights to sample with")
        for name, parameter in parameters.items():
            # The pieces are filled directly, so that no parameter is ever whole on a device.
            piece = parameter.ds_tensor
            own = weights[name].flatten()[dist.get_rank() * piece.numel() :][: piece.numel()]
            # The last rank's piece may be longer than what is left of the parameter: its end is padding.
            piece.data[: len(own)].copy_(own)

        # Kept because its destruction would remove the hooks that gather parameters.
        self._engine = deepspeed.initialize(model=self.module, config=config)[0]

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Return a context in which the parameter is whole. Collective."""
        return deepspeed.zero.GatheredParameters([parameter])

    def bytes(self) -> tuple[int, int]:
        """Return the bytes of parameters on this rank now, and of the whole network; not collective."""
        parameters: list[Any] = list(self.module.parameters())
        own = sum(parameter.data.nbytes + parameter.ds_tensor.nbytes for parameter in parameters)
        return own, sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
