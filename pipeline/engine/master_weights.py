"""The flat fp32 tensors that a rank owns under ZeRO, in one form for every stage: masters, Adam moments and averages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from pipeline.engine.layout import Layout
from pipeline.engine.muon import MUON

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class ShardState:
    """All that a checkpoint holds of one rank; the tensors are the live ones."""

    layout: Layout
    tensors: dict[str, list[Tensor]]
    """`master`, `exp_avg`, `exp_avg_sq`, `ema_0`, ...: one flat fp32 tensor per sub-group."""
    optimizer_step: int
    groups: list[dict[str, Any]]
    """Settings of each parameter group."""
    decays: list[float]
    replicated: dict[str, Tensor]
    """Persistent buffers and frozen parameters, whole, equal on all ranks."""


class MasterWeights:
    """One rank's fp32 master weights and Adam moments inside a DeepSpeed optimizer."""

    def __init__(self, optimizer: Any, module: nn.Module, stage: int, rank: int, world: int) -> None:
        """Find the tensors in `optimizer`, which is DeepSpeed's for the ZeRO stage."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.rank = rank
        self.inner: torch.optim.Optimizer = optimizer.optimizer
        self._optimizer = optimizer
        self._compute: list[Tensor] = []
        if stage == 3:
            groups = optimizer.fp16_groups
            self.tensors: list[Tensor] = optimizer.fp32_partitioned_groups_flat
            self._compute = optimizer.fp16_partitioned_groups_flat
            self._settings = [self.inner.param_groups[optimizer.sub_group_to_group_id[i]] for i in range(len(groups))]
        elif hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 has a class of its own
            groups, self.tensors = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
            self._settings = self.inner.param_groups
        else:
            groups, self.tensors = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
            self._settings = self.inner.param_groups
        self.layout = Layout(
            world=world,
            partition="parameter" if stage == 3 else "flat",
            groups=[[(names[id(p)], tuple(getattr(p, "ds_shape", p.shape))) for p in group] for group in groups],
            lengths=[tensor.numel() for tensor in self.tensors],
        )
        wrong = {tensor.dtype for tensor in self.tensors} - {torch.float32}
        if wrong:
            raise AssertionError(f"master weights are {wrong}, not fp32")

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights that the network computes with those of the masters, on every rank. Collective.

        ZeRO-3 keeps parameters gathered after a forward pass, so they have to be partitioned before and gathered after.
        """
        if not self._compute:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for compute, master in zip(self._compute, self.tensors, strict=True):
            compute.copy_(master)
        self._optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def fill(self, value: Callable[[str, int, int], Tensor], names: Sequence[str] | None = None) -> None:
        """Set the masters from `value(name, start, stop)` of flattened parameters, for `names` or all; padding becomes 0."""
        if names is None:
            for tensor in self.tensors:
                tensor.zero_()
        for run in self.layout.held(self.rank):
            if names is None or run.name in names:
                target = self.tensors[run.group][run.offset : run.offset + run.length]
                target.copy_(value(run.name, run.start, run.start + run.length))

    def moments(self) -> dict[str, list[Tensor]]:
        """The Adam moments, as zeros where no step was done yet; Muon has no second, and an empty tensor in its place."""
        for master, settings in zip(self.tensors, self._settings, strict=True):
            state = self.inner.state[master]
            if not state:
                on_device = settings.get("fused") or settings.get("capturable")
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
                state.update({name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS})
                if settings["name"] == MUON:
                    state["exp_avg_sq"] = master.new_zeros(0, requires_grad=False)
        return {name: [self.inner.state[master][name] for master in self.tensors] for name in MOMENTS}

    @property
    def step(self) -> int:
        """Number of applied optimizer steps.

        Raises:
            AssertionError: the sub-groups disagree.
        """
        steps = {int(state["step"]) for master in self.tensors if (state := self.inner.state.get(master))} or {0}
        if len(steps) > 1:
            raise AssertionError(f"sub-groups disagree on the optimizer step: {sorted(steps)}")
        return steps.pop()

    @step.setter
    def step(self, value: int) -> None:
        self.moments()
        for master in self.tensors:
            self.inner.state[master]["step"].fill_(value)


def check_names(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], source: str, may_be_new: str | None = None
) -> list[str]:
    """Hold the network's parameters against those of a file.

    Args:
        wanted: shapes of the network's.
        given: shapes of the file's.
        source: what to call the file.
        may_be_new: prefix of modules whose children may be missing as whole branches: a child, or an element of a list
            below, none of whose parameters is in the file.

    Returns:
        The parameters that belong to new branches.

    Raises:
        UserError: parameters are missing, left over, or of another shape; the message names them.
    """
    new = [name for name in wanted if name not in given and may_be_new is not None and _is_new(name, given, may_be_new)]
    missing = [name for name in wanted if name not in given and name not in set(new)]
    if missing:
        raise UserError(f"{source}: lacks {_some(missing)}: use the model and fusion settings that it was made with")
    left_over = [name for name in given if name not in wanted]
    if left_over:
        raise UserError(
            f"{source}: the network has no {_some(left_over)}: use the model and fusion settings that it was made with"
        )
    for name, shape in wanted.items():
        if name in given and tuple(given[name]) != tuple(shape):
            raise UserError(
                f"{source}: {name} has shape {tuple(given[name])}, not {tuple(shape)}: use the settings it was made with"
            )
    return new


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_new(name: str, given: Mapping[str, Any], prefix: str) -> bool:
    """Whether a whole branch below `prefix` that holds `name` is absent from `given`."""
    if not name.startswith(prefix):
        return False
    parts = name.split(".")
    child = prefix.count(".") + 1
    ends = [end for end in range(child, len(parts)) if end == child or parts[end - 1].isdigit()]
    branches = [".".join(parts[:end]) + "." for end in ends]
    return any(not any(other.startswith(branch) for other in given) for branch in branches)
