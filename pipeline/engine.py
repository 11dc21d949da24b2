"""The network under DeepSpeed ZeRO: forward, backward, step, moving averages. The only file that imports deepspeed.

- Parameters are made under `zero.Init` in fp32, each partitioned as soon as its module is built: no rank ever holds the
  whole network, and the fp32 masters start as exactly what the plain network would, not as rounded bf16.
- A DiT block is a ZeRO-3 leaf: gathered whole by one hook, so that its compiled forward is one graph without breaks.
- Settings and their reasons stand in pipeline/zero.py.
"""

import gc
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import set_z3_leaf_modules

from model.dit import DiTBlock
from model.errors import UserError
from pipeline.compiled import compile_blocks, make_graphs
from pipeline.config import EngineConfig, StageConfig
from pipeline.distributed import Ranks
from pipeline.ema import ShardedEMA
from pipeline.masters import Masters, ShardState, check_names
from pipeline.muon import Muon
from pipeline.optim import parameter_groups
from pipeline.zero import cast_parameters, check_settings, deepspeed_config, take_fp32

log = logging.getLogger(__name__)

NEW_BRANCHES = "fusion."
"""Where a later stage may add branches, each of which starts as the identity."""


class Engine:
    """A sharded network and its optimizer; every method is collective unless it says otherwise."""

    def __init__(self, build: Callable[[], nn.Module], stage: StageConfig, local_batch: int) -> None:
        """Start the process group if there is none, build the network in shards, and make the optimizer.

        Args:
            build: makes the network; it draws from torch's default generator, which all ranks must have seeded alike.
            stage: settings.
            local_batch: samples of the global batch that this rank trains on in each step.

        Raises:
            UserError: a setting cannot be met, or DeepSpeed cannot compile its extension on this machine.
        """
        ranks = start(stage.engine.timeout_minutes)
        self.rank, self.world, self.stage = ranks.rank, ranks.world, stage
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = torch.bfloat16 if stage.engine.precision == "bf16" else torch.float32
        self.micro_batch = stage.engine.micro_batch or local_batch
        self.micro_steps, left = divmod(local_batch, self.micro_batch)
        if left:
            raise UserError(
                f"engine.micro_batch={self.micro_batch} does not divide the {local_batch} samples of a rank: change it"
            )
        check_settings(stage)
        config = deepspeed_config(stage, self.micro_batch, self.micro_steps)

        self.module: Any
        if stage.engine.zero_stage == 3:
            self.module = _build_in_shards(build, config)
        else:
            self.module = build().to(self.device)
        first = take_fp32(self.module)
        cast_parameters(self.module, self.dtype)
        self._leaves = [block for block in self.module.modules() if isinstance(block, DiTBlock)]
        if stage.model.compile:
            compile_blocks(self._leaves)

        self._engine, _, _, _ = deepspeed.initialize(model=self.module, optimizer=self._optimizer(), config=config)
        optimizer: Any = self._engine.optimizer
        self.masters = Masters(optimizer, self.module, stage.engine.zero_stage, self.rank, self.world)
        if isinstance(self.masters.inner, Muon):
            self.masters.inner.bind(self.masters.layout, self.masters.tensors)
        self.masters.fill(first)
        self.averages = [ShardedEMA(decay, self.masters.tensors) for decay in stage.ema]
        self._micro_step, self._limit, self._norm = 0, float("inf"), float("nan")
        if stage.engine.zero_stage == 3:
            self._norms_of_groups, optimizer._get_norm_groups = optimizer._get_norm_groups, self._limited_norms

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.stage.optim
        groups = [
            {"params": group.parameters, "weight_decay": group.weight_decay, "name": group.name}
            for group in parameter_groups(self.module, config.weight_decay, muon=config.name == "muon")
        ]
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": (config.betas[0], config.betas[1]),
            "eps": config.eps,
            "fused": True,
        }
        return Muon(groups, config.momentum, **settings) if config.name == "muon" else torch.optim.AdamW(groups, **settings)

    def warm_up(self, samples: int, patches: int) -> None:
        """Compile the blocks for a batch of `samples` on this rank, of `patches` patches each; changes nothing else.

        Raises:
            ValueError: as `micro_batches`.
        """
        part = next(self.micro_batches(samples))
        block = self._leaves[0]
        with deepspeed.zero.GatheredParameters(list(block.parameters())):
            make_graphs(block, part.stop, patches)

    # -- a training step --------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Tensor:
        """Run the network forward."""
        return self._engine(*inputs)

    def micro_batches(self, size: int) -> Iterator[slice]:
        """The parts of a rank's batch of `size` samples, one per forward and backward pass; not collective.

        A bucket may have fewer samples a batch than the engine was made for, and then has them in each part.

        Raises:
            ValueError: `size` is more than the engine's local batch, or does not divide into its micro-steps.
        """
        part, left = divmod(size, self.micro_steps)
        if left or not 0 < part <= self.micro_batch:
            raise ValueError(f"a batch of {size} samples, the engine was made for {self.micro_batch * self.micro_steps}")
        return (slice(start, start + part) for start in range(0, size, part))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss, scaled so that the step sees the mean over the batch."""
        self._engine.backward(loss)
        self._micro_step += 1
        if self._micro_step < self.micro_steps:
            self._engine.step()  # only counts the micro-step

    def step(self, lr: float, limit: float = float("inf")) -> tuple[bool, float]:
        """Clip the gradients and update the weights, unless the gradients are not finite or their norm is above `limit`.

        Args:
            lr: learning rate of this step.
            limit: largest norm of a step that is applied (ZeRO-3 only).

        Returns:
            Whether the weights were updated (the same on all ranks), and the norm of the gradients before clipping.

        Raises:
            RuntimeError: `backward` was not called once per micro-batch.
        """
        if self._micro_step != self.micro_steps:
            raise RuntimeError(f"step after {self._micro_step} of {self.micro_steps} backward passes")
        for group in self.masters.inner.param_groups:
            group["lr"] = lr
        self._micro_step, self._limit, self._norm = 0, limit, float("nan")
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if self.stage.engine.zero_stage != 3:
            norm = self._engine.get_global_grad_norm()
            self._norm = float("inf") if norm is None else float(norm)
        return applied, self._norm

    def _limited_norms(self) -> list[Tensor]:
        """DeepSpeed's norms per group, made invalid when the whole is above the limit: it then skips on all ranks."""
        norms = self._norms_of_groups()
        stacked = torch.stack([norm.float() for norm in norms])
        invalid = (~torch.isfinite(stacked) | (stacked < 0)).any()
        self._norm = float(torch.where(invalid, torch.inf, torch.linalg.vector_norm(stacked)))
        return norms if self._norm <= self._limit else [torch.full_like(norm, -1.0) for norm in norms]

    def update_averages(self, samples: int) -> None:
        """Move the averages after an applied step; `samples` were seen with it. Not collective, no communication."""
        for average in self.averages:
            average.update(samples // self.stage.global_batch - 1)

    @contextmanager
    def averaged(self, index: int = 0) -> Iterator[None]:
        """The network computes with an average's weights inside; afterwards all is bit for bit as before."""
        average = self.averages[index]
        average.swap()
        self.masters.publish()
        try:
            yield
        finally:
            average.swap()
            self.masters.publish()

    # -- state ------------------------------------------------------------------------------------------------------------

    def state(self) -> ShardState:
        """What a checkpoint holds of this rank."""
        tensors = {"master": [master.detach() for master in self.masters.tensors], **self.masters.moments()}
        tensors |= {f"ema_{index}": average.averages for index, average in enumerate(self.averages)}
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.masters.inner.param_groups]
        step = self.masters.step
        decays = [average.decay for average in self.averages]
        return ShardState(self.masters.layout, tensors, step, groups, decays, self._replicated())

    def finish_load(self, optimizer_step: int, replicated: Mapping[str, Tensor]) -> None:
        """Make what was written into `state()`'s tensors the state of training."""
        self.masters.step = optimizer_step
        self._set_replicated(replicated)
        self.masters.publish()

    def load_full(self, weights: Mapping[str, Tensor], new_branches: bool = False) -> list[str]:
        """Take whole weights, such as another stage's; moments become zero and the averages start from the weights.

        Args:
            weights: fp32 tensors by name; read one after another, so the mapping may read lazily.
            new_branches: whether branches of the fusion that the weights do not have may keep their starting weights.

        Returns:
            The parameters that kept their starting weights.

        Raises:
            UserError: weights are missing, left over, or of another shape.
        """
        replicated = self._replicated()
        wanted = self.masters.layout.shapes | {name: tuple(tensor.shape) for name, tensor in replicated.items()}
        shapes = getattr(weights, "shapes", None) or {name: tuple(tensor.shape) for name, tensor in weights.items()}
        new = check_names(wanted, shapes, "weights to start from", NEW_BRANCHES if new_branches else None)
        for name in self.masters.layout.shapes:
            if name not in new:
                whole = weights[name].flatten()
                self.masters.fill(lambda _, start, stop, whole=whole: whole[start:stop], [name])
        for moment in (moment for moments in self.masters.moments().values() for moment in moments):
            moment.zero_()
        for average in self.averages:
            average.reset()
        self.finish_load(0, {name: weights[name] for name in replicated if name not in new})
        if new and self.rank == 0:
            log.warning("new branches keep their starting weights: %s", ", ".join(new))
        return new

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}" if path else name: buffer
            for path, module in self.module.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if not parameter.requires_grad}

    def _replicated(self) -> dict[str, Tensor]:
        values = {name: buffer.detach().to("cpu", copy=True) for name, buffer in self._buffers().items()}
        for name, parameter in self._frozen().items():
            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().to("cpu", copy=True)
        return values

    @torch.no_grad()
    def _set_replicated(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self._buffers().items():
            if name in values:
                buffer.copy_(values[name])
        for name, parameter in self._frozen().items():
            if name in values:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(values[name])


class ShardedNetwork:
    """A network to draw with under ZeRO-3: each rank holds a share of every parameter, and neither gradients nor an optimizer.

    The ranks have to run `module` equally often, since each pass gathers its parameters from all of them.
    """

    def __init__(
        self, build: Callable[[], nn.Module], weights: Mapping[str, Tensor], dtype: torch.dtype, settings: EngineConfig
    ) -> None:
        """Build it in shards, in the process group that `start` made.

        Args:
            build: makes the network.
            weights: by name; read one after another, so the mapping may read lazily.
            dtype: in which the network computes.
            settings: of ZeRO-3; stage, precision and `hpz` are not read.

        Raises:
            UserError: the weights are those of another network.
        """
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        stage = StageConfig(engine=replace(settings, zero_stage=3, precision=precision, hpz=1))
        config = deepspeed_config(stage, 1, 1)
        self.module: Any = _build_in_shards(build, config).requires_grad_(False)
        cast_parameters(self.module, dtype)
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        shapes = getattr(weights, "shapes", None) or {name: tuple(tensor.shape) for name, tensor in weights.items()}
        check_names({name: tuple(parameter.ds_shape) for name, parameter in parameters.items()}, shapes, "weights to draw with")
        for name, parameter in parameters.items():
            piece = parameter.ds_tensor
            own = weights[name].flatten()[dist.get_rank() * piece.numel() :][: piece.numel()]
            piece.data[: len(own)].copy_(own)
        self._engine = deepspeed.initialize(model=self.module, config=config)[0]  # its end would take the hooks away

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Inside, the parameter is whole. Collective."""
        return deepspeed.zero.GatheredParameters([parameter])

    def bytes(self) -> tuple[int, int]:
        """Bytes of parameters that this rank holds now, and those of the whole network; not collective."""
        parameters: list[Any] = list(self.module.parameters())
        held = sum(parameter.data.nbytes + parameter.ds_tensor.nbytes for parameter in parameters)
        return held, sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)


def _build_in_shards(build: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    """The network in fp32, each layer partitioned as soon as it is built."""
    # the type is told by the configuration: where fp16 is not supported, 0.19.8 overlooks the `dtype` argument
    with deepspeed.zero.Init(config_dict_or_path=config | {"bf16": {"enabled": False}}):
        module = build()
    if any(isinstance(block, DiTBlock) for block in module.modules()):
        set_z3_leaf_modules(module, [DiTBlock])
    return module


def start(timeout_minutes: int) -> Ranks:
    """Join the run's process group, unless this process has done so; ranks come from torchrun, Slurm, or are one.

    Args:
        timeout_minutes: how long a collective waits for a rank before the run ends.

    Raises:
        UserError: this machine lacks what DeepSpeed compiles its CPU extension with, or the ranks are inconsistent.
    """
    ranks = Ranks.from_environment()
    if torch.cuda.is_available():
        # a task that Slurm gave one GPU sees it as number 0, whatever its local rank is
        device = ranks.local_rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    elif not dist.is_initialized():
        _check_compiler()
    deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))
    return ranks


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"{compiler} not found, with which DeepSpeed compiles a small extension on CPU: apt-get install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise UserError("Python.h not found, with which DeepSpeed compiles a small extension on CPU: apt-get install python3-dev")


def leave(code: int) -> None:
    """End this process with `code`, after the other ranks have come here too.

    The interpreter's own exit aborts now and then while gloo or NCCL threads still run, so it is not taken.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
