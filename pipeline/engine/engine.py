"""The network under DeepSpeed ZeRO: forward, backward, step, moving averages.

- Parameters are made under `zero.Init` in fp32, each partitioned as soon as its module is built: no rank ever
  holds the whole network, and the fp32 masters start with exactly the values of the plain network, not with
  values rounded to bf16.
- A block of the DiT or of a refiner is a ZeRO-3 leaf: gathered whole by one hook, so that its compiled
  forward is one graph without breaks.
- Settings and their reasons are in pipeline/engine/settings.py.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from model.common.dtypes import DTYPES
from model.common.errors import UserError
from model.region import Region
from pipeline.engine.attention import choose_attention
from pipeline.engine.buckets import Buckets
from pipeline.engine.compile import compile_regions, make_graphs, warm_lengths
from pipeline.engine.ema import ShardedEMA
from pipeline.engine.flat_step import FlatStep
from pipeline.engine.lazy import LAZY, hold_absent_rows
from pipeline.engine.master_weights import MasterWeights, RankState, check_names
from pipeline.engine.optim import optimizer_settings, parameter_groups
from pipeline.engine.partitioned import build_partitioned
from pipeline.engine.processes import join_process_group
from pipeline.engine.reduction import ReduceOnce, accumulate_in_fp32
from pipeline.engine.settings import cast_parameters, check_settings, deepspeed_config, take_fp32
from pipeline.engine.streams import disable_ranges
from pipeline.engine.world import replace_loops
from pipeline.stage.config import StageConfig

log = logging.getLogger(__name__)


class Engine:
    """A partitioned network and its optimizer; every method is collective unless it says otherwise."""

    def __init__(self, build: Callable[[], nn.Module], stage: StageConfig, local_batch: int) -> None:
        """Join the process group, build the network partitioned, and make the optimizer.

        Args:
            build: makes the network; it draws from torch's default generator, which must be seeded alike on
                all ranks.
            stage: settings.
            local_batch: samples of the global batch that this rank trains on in each step.

        Raises:
            UserError: if a setting cannot be met, or blocks cannot be compiled on this machine.
        """
        ranks = join_process_group(stage.engine.timeout_minutes)
        self.rank, self.world, self.stage = ranks.rank, ranks.world, stage
        # Checkpoints contain single frozen parameters, but no frozen network.
        self.keeps_frozen = stage.freeze == "none"
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = DTYPES[stage.engine.precision]

        # A run on many GPUs may have fewer samples per rank than fit at once.
        self.micro_batch = min(stage.engine.micro_batch or local_batch, local_batch)
        self.micro_steps, remainder = divmod(local_batch, self.micro_batch)
        if remainder:
            raise UserError(
                f"engine.micro_batch={self.micro_batch} does not divide the {local_batch} samples of a rank: "
                "change it"
            )
        # A sandwich runs each micro-batch through the full network, and then through a part of it.
        self.backward_passes = self.micro_steps * (2 if stage.elastic.sandwich else 1)
        # Before anything is built, which takes minutes for a large network: a wrong setting fails at once.
        check_settings(stage)
        if ranks.world % stage.engine.hpz:
            raise UserError(
                f"engine.hpz={stage.engine.hpz} does not divide the {ranks.world} processes: change it"
            )
        disable_ranges()
        replace_loops()
        choose_attention(stage.engine.attention)
        config = deepspeed_config(stage, self.micro_batch, self.backward_passes)

        is_sharded = stage.engine.zero_stage == 3
        self.module: Any = build_partitioned(build, config) if is_sharded else build().to(self.device)

        # DeepSpeed makes the masters from the cast parameters; `fill` below gives them their exact values.
        initial = take_fp32(self.module)
        cast_parameters(self.module, self.dtype)
        # With a single backward pass there is nothing to add up.
        reduces_once = stage.engine.reduce_once and self.backward_passes > 1
        if reduces_once:
            accumulate_in_fp32(self.module)

        self._regions = [part for part in self.module.modules() if isinstance(part, Region)]
        if stage.model.compile:
            compile_regions(self._regions, stage.model.activation_memory_budget)

        settings = optimizer_settings(stage.optim)
        inner = settings.build(parameter_groups(self.module, stage.optim))
        for group in inner.param_groups:
            if group.get(LAZY):
                group["lr_factor"] = stage.users.table_lr
        hold_absent_rows(inner)
        self._engine, _, _, _ = deepspeed.initialize(model=self.module, optimizer=inner, config=config)
        self._optimizer: Any = self._engine.optimizer
        if is_sharded:
            Buckets(self._optimizer)

        self.master_weights = MasterWeights(
            self._optimizer, self.module, settings, stage.engine.zero_stage, self.rank, self.world
        )
        # The optimizer was made on parameters; only now are there flat masters, with places in them.
        settings.bind(inner, self.master_weights.layout, self.master_weights.tensors)
        self.master_weights.fill(initial)
        # After `fill`, because an average starts as a copy of the masters.
        self.averages = [ShardedEMA(decay, self.master_weights.tensors) for decay in stage.ema]

        self._micro_step = 0
        self._flat = FlatStep(self._optimizer, stage.optim.clip) if is_sharded else None
        self._reduction = ReduceOnce(self._optimizer) if reduces_once else None

    def warm_up(
        self,
        samples: int,
        grid: Sequence[int],
        cuts: Sequence[int] = (),
        texts: Iterable[tuple[Sequence[int], Sequence[int]]] = (),
    ) -> None:
        """Compile the network's regions for a batch, and run them at lengths of text; change nothing else.

        Args:
            samples: samples of the batch on this rank.
            grid: patches of each sample along each axis.
            cuts: lengths of the LLMs' prefixes that the token refiners cut off.
            texts: tokens of each LLM's captions and of its prefix, for each case.

        Raises:
            ValueError: if `micro_batches` raises it.
        """
        part, ragged = next(self.micro_batches(samples)), self.stage.engine.ragged_text
        texts = list(texts)
        # All regions of a class share their graphs.
        for region in {type(region): region for region in self._regions}.values():
            # The graph reads whole weights, outside of a forward pass that would gather them.
            with deepspeed.zero.GatheredParameters(list(region.parameters())):
                make_graphs(region, part.stop, grid, cuts, ragged)
                lengths = [region.text_lengths(captions, prefixes, cuts) for captions, prefixes in texts]
                warm_lengths(region, part.stop, grid, set().union(*lengths), ragged)

    # -- a training step --

    def __call__(self, *inputs: Any) -> Tensor:
        """Run the network forward."""
        return self._engine(*inputs)

    def micro_batches(self, size: int) -> Iterator[slice]:
        """Split a rank's batch of `size` samples into parts, one per forward and backward pass.

        Not collective. A bucket may have fewer samples per batch than the engine was made for: its parts are
        then smaller, not fewer.

        Raises:
            ValueError: if `size` is more than the engine's local batch, or does not divide into its
                micro-steps.
        """
        part, remainder = divmod(size, self.micro_steps)
        if remainder or not 0 < part <= self.micro_batch:
            raise ValueError(
                f"a batch of {size} samples, the engine was made for {self.micro_batch * self.micro_steps}"
            )
        return (slice(start, start + part) for start in range(0, size, part))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss; a step uses their mean over its backward
        passes."""
        last = self._micro_step + 1 == self.backward_passes
        if self._reduction is not None:
            self._reduction.before_backward(last)

        self._engine.backward(loss)
        self._micro_step += 1

        if not last:
            self._engine.step()  # only counts the micro-step
        elif self._reduction is not None:
            self._reduction.finish()

    def step(self, lr: float, limit: float = float("inf")) -> tuple[bool, float]:
        """Clip the gradients and update the weights, unless the gradients are not finite or above `limit`.

        The gradient of a parameter that no micro-step used is zero.

        Args:
            lr: learning rate of this step.
            limit: largest norm of a step that is applied (ZeRO-3 only).

        Returns:
            True if the weights were updated (the same on all ranks), and the norm of the gradients before
            clipping.

        Raises:
            RuntimeError: if `backward` was not called `backward_passes` times.
        """
        if self._micro_step != self.backward_passes:
            raise RuntimeError(f"step after {self._micro_step} of {self.backward_passes} backward passes")
        # Set here and not by a scheduler of DeepSpeed, which would count steps instead of samples.
        for group in self.master_weights.inner.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self._micro_step = 0
        if self._flat is not None:
            self._flat.limit = limit

        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if self._flat is not None:
            return applied, self._flat.norm
        norm = self._engine.get_global_grad_norm()
        return applied, float("inf") if norm is None else float(norm)

    def update_averages(self, samples: int) -> None:
        """Update the averages after an applied step; `samples` have been seen with it. Not collective."""
        for average in self.averages:
            # From samples, so that the warm-up of the averages needs no state in the checkpoint.
            average.update(samples // self.stage.global_batch - 1)

    @contextmanager
    def averaged(self, index: int = 0) -> Iterator[None]:
        """Return a context in which the network has the weights of average `index`; it leaves no trace."""
        average = self.averages[index]
        # The masters are only exchanged, not recomputed: training goes on with exactly the same weights.
        average.swap()
        self.master_weights.publish()
        # `finally`: an error in the block, such as one in validation, must not leave the averages in the
        # masters.
        try:
            yield
        finally:
            average.swap()
            self.master_weights.publish()

    # -- state --

    def state(self) -> RankState:
        """Return what a checkpoint stores of this rank."""
        masters = self.master_weights
        tensors = {"master": [master.detach() for master in masters.tensors], **masters.moments()}
        tensors |= {f"ema_{index}": average.averages for index, average in enumerate(self.averages)}

        groups = []
        for group in masters.inner.param_groups:
            groups.append({key: value for key, value in group.items() if key != "params"})

        decays = [average.decay for average in self.averages]
        return RankState(masters.layout, tensors, masters.step, groups, decays, self._replicated())

    def finish_load(self, optimizer_step: int, replicated: Mapping[str, Tensor]) -> None:
        """Continue training from the values that were written into the tensors of `state()`."""
        self.master_weights.step = optimizer_step
        self._set_replicated(replicated)
        self.master_weights.publish()

    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        """Set the frozen parameters of a network with `freeze: base`, which checkpoints do not contain."""
        for name, parameter in frozen_parameters(self.module).items():
            # One at a time; rank 0 reads and the others receive, unless each has all weights anyway.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if self.rank == 0 or self.stage.engine.zero_stage < 3:
                    parameter.copy_(weights[name])
        self.master_weights.publish()

    def load_full(self, weights: Mapping[str, Tensor], new_branches: Sequence[str] = ()) -> list[str]:
        """Start from whole weights, such as another stage's; reset the moments and the averages.

        Args:
            weights: fp32 tensors by name; read one after another, so the mapping may read lazily.
            new_branches: modules whose branches keep their initial weights if `weights` lacks them; see
                `check_names`.

        Returns:
            The parameters that kept their initial weights.

        Raises:
            UserError: if weights are missing, superfluous, or have another shape.
        """
        replicated = self._replicated()
        wanted = self.master_weights.layout.shapes | {
            name: tuple(tensor.shape) for name, tensor in replicated.items()
        }
        frozen: dict[str, Any] = {} if self.keeps_frozen else frozen_parameters(self.module)
        wanted |= {name: tuple(getattr(base, "ds_shape", base.shape)) for name, base in frozen.items()}
        # Files know their shapes: to look at the tensors would read all of them.
        shapes = getattr(weights, "shapes", None) or {
            name: tuple(tensor.shape) for name, tensor in weights.items()
        }
        new = check_names(wanted, shapes, "weights to start from", new_branches)

        for name in self.master_weights.layout.shapes:
            if name not in new:
                # One parameter at a time: no rank has memory for all of them.
                whole = weights[name].flatten()
                self.master_weights.fill(lambda _, start, stop, whole=whole: whole[start:stop], [name])
        # Moments of other weights would push the first steps in a wrong direction.
        for moments in self.master_weights.moments().values():
            for moment in moments:
                moment.zero_()
        for average in self.averages:
            average.reset()

        if frozen:
            self.load_base(weights)
        self.finish_load(0, {name: weights[name] for name in replicated if name not in new})
        if new and self.rank == 0:
            log.warning("new branches keep their starting weights: %s", ", ".join(new))
        return new

    def _replicated(self) -> dict[str, Tensor]:
        values = {
            name: buffer.detach().to("cpu", copy=True) for name, buffer in stored_buffers(self.module).items()
        }
        if not self.keeps_frozen:
            return values
        for name, parameter in frozen_parameters(self.module).items():
            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().to("cpu", copy=True)
        return values

    @torch.no_grad()
    def _set_replicated(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in stored_buffers(self.module).items():
            if name in values:
                buffer.copy_(values[name])
        for name, parameter in frozen_parameters(self.module).items():
            if name in values:
                # Rank 0's value goes to all ranks, so they cannot disagree.
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(values[name])


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return a network's persistent buffers by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's frozen parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
