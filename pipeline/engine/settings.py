"""A stage's engine settings as DeepSpeed's configuration, and the parameters' exact fp32 start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from pipeline.stage.config import StageConfig


def deepspeed_config(stage: StageConfig, micro_batch: int, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    - Gradients are reduced and accumulated in fp32: by default a bf16 run does both in bf16, and loses small gradients.
    - `memory_efficient_linear` replaces torch's linear function process-wide and changes the numbers.
    - `prefetch_bucket` has to hold at least a block, else a leaf is not prefetched; `max_live_parameters` and
      `max_reuse_distance` bound what stays gathered; `reduce_bucket` is allocated once, in fp32.
    """
    engine = stage.engine
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "bf16": {"enabled": engine.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": stage.optim.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": stage.optim.name == "muon",  # ours, see pipeline/engine/muon.py
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap_comm,
            "contiguous_gradients": True,
            "memory_efficient_linear": False,
            "reduce_bucket_size": engine.reduce_bucket,
            "sub_group_size": engine.sub_group_size,
            "stage3_prefetch_bucket_size": engine.prefetch_bucket,
            "stage3_max_live_parameters": engine.max_live_parameters,
            "stage3_max_reuse_distance": engine.max_reuse_distance,
            "stage3_param_persistence_threshold": engine.persistence_threshold,
            "zero_hpz_partition_size": engine.hpz,
        },
    }


def check_settings(stage: StageConfig) -> None:
    """Refuse what DeepSpeed 0.19.8 cannot do right.

    Raises:
        UserError: such a setting is on.
    """
    if stage.optim.name == "muon" and stage.engine.zero_stage != 3:
        raise UserError(f"optim.name=muon needs engine.zero_stage=3, not {stage.engine.zero_stage}: change one of them")
    if stage.optim.spike is not None and stage.engine.zero_stage != 3:
        raise UserError(f"optim.spike needs engine.zero_stage=3, not {stage.engine.zero_stage}: change one of them")


def take_fp32(module: nn.Module) -> Callable[[str, int, int], Tensor]:
    """Copy the starting values that this rank holds, for `MasterWeights.fill`: its pieces under ZeRO-3, else all."""
    pieces, whole = {}, {}
    for name, parameter in module.named_parameters():
        piece: Tensor | None = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            pieces[name] = piece.detach().clone()
        else:
            whole[name] = parameter.detach().flatten().clone()

    def value(name: str, start: int, stop: int) -> Tensor:
        return pieces[name][: stop - start] if name in pieces else whole[name][start:stop]

    return value


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, partitioned or whole, to the type that the network computes in; buffers keep theirs."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        piece: Tensor | None = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            piece.data = piece.data.to(dtype)
