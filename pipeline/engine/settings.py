"""A stage's engine settings as DeepSpeed's configuration, and the fp32 values that the masters start from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.blocks import BLOCKS
from model.common.errors import UserError
from pipeline.engine.optim import optimizer_settings
from pipeline.stage.config import StageConfig


def deepspeed_config(stage: StageConfig, micro_batch: int, micro_steps: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    - Gradients are reduced and accumulated in fp32: by default a bf16 run does both in bf16 and loses small
      gradients.
    - The throughput timer is off: it would wait for the device twice per micro-step.
    - `memory_efficient_linear` is off: it replaces torch's linear function in the whole process and changes
      the numbers.
    - `prefetch_bucket` has to hold at least one block, or ZeRO-3 does not prefetch it; `max_live_parameters`
      and `max_reuse_distance` limit what stays gathered; `reduce_bucket` is allocated once, in fp32.

    Args:
        stage: the stage.
        micro_batch: samples per rank and micro-step.
        micro_steps: forward and backward passes per step.
    """
    engine = stage.engine
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "bf16": {"enabled": engine.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": stage.optim.clip,
        # The trainer reports; DeepSpeed would print lines of its own.
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,  # the tests of this project test them
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap_comm,
            # ZeRO-1 and 2 copy gradients into one buffer as they come, which avoids fragmented memory in the
            # backward pass. `Buckets` puts those of ZeRO-3 together when their bucket is full.
            "contiguous_gradients": engine.zero_stage != 3,
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
    """Check the optimizer's settings, and refuse what does not work with DeepSpeed 0.19.8.

    Raises:
        UserError: if the optimizer or one of its settings is unknown, or if a setting needs another ZeRO
            stage.
    """
    zero_stage = stage.engine.zero_stage
    stages = optimizer_settings(stage.optim).zero_stages
    if zero_stage not in stages:
        allowed = " or ".join(map(str, stages))
        raise UserError(
            f"optim.name={stage.optim.name} needs engine.zero_stage={allowed}, not {zero_stage}: "
            "change one of them"
        )
    if stage.model.activation_memory_budget < 1 and not stage.model.compile:
        raise UserError(
            f"model.activation_memory_budget={stage.model.activation_memory_budget:g} needs "
            "model.compile=true: set one of them"
        )
    if stage.engine.reduce_once and zero_stage != 3:
        raise UserError(f"engine.reduce_once needs engine.zero_stage=3, not {zero_stage}: change one of them")
    _check_ragged(stage)
    # Only ZeRO-3 computes the norm before it is decided that the step is applied: see `Engine.__init__`.
    if stage.optim.spike is not None and zero_stage != 3:
        raise UserError(f"optim.spike needs engine.zero_stage=3, not {zero_stage}: change one of them")


def _check_ragged(stage: StageConfig) -> None:
    """Check that all that reads text takes it without padding.

    Raises:
        UserError: if something does not.
    """
    if not stage.engine.ragged_text:
        return
    if not BLOCKS[stage.model.block].reads_ragged:
        raise UserError(
            f"engine.ragged_text: blocks of the type {stage.model.block} read padded text alone: set it to "
            "false"
        )
    if stage.users.count:
        raise UserError("engine.ragged_text: the adapter of users reads padded text alone: set it to false")


def take_fp32(module: nn.Module) -> Callable[[str, int, int], Tensor]:
    """Copy this rank's initial values, before they are cast: pieces under ZeRO-3, else whole parameters.

    Returns:
        A function for `MasterWeights.fill`.
    """
    pieces, whole = {}, {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # it has no master
            continue
        piece: Tensor | None = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            pieces[name] = piece.detach().clone()
        else:
            whole[name] = parameter.detach().flatten().clone()

    def value(name: str, start: int, stop: int) -> Tensor:
        # A piece begins at this rank's `start`; behind `stop` it has only padding.
        return pieces[name][: stop - start] if name in pieces else whole[name][start:stop]

    return value


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, partitioned or whole, to the type that the network computes in, but not buffers."""
    for parameter in module.parameters():
        # By `.data`, so that the parameter stays the same object, with ZeRO-3's attributes on it.
        parameter.data = parameter.data.to(dtype)
        piece: Tensor | None = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            piece.data = piece.data.to(dtype)
            # The second copies of hpZ are still fp32. Without them, the first forward pass gathers the pieces
            # above and makes the copies again.
            if parameter.ds_secondary_tensor is not None:  # pyright: ignore[reportAttributeAccessIssue]
                parameter.ds_secondary_tensor = None  # pyright: ignore[reportAttributeAccessIssue]
