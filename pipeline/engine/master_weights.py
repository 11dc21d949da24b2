"""The flat fp32 tensors of a rank under ZeRO, in one form for every stage: masters, moments and averages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from pipeline.engine.layout import Layout, Parameter
from pipeline.engine.optim import OptimizerSettings
from pipeline.engine.streams import order_gathers


@dataclass
class RankState:
    """Everything that a checkpoint stores of one rank; the tensors are the live ones."""

    layout: Layout
    tensors: dict[str, list[Tensor]]
    """`master`, the optimizer's moments such as `exp_avg`, and `ema_0`, ...: one flat fp32 tensor per
    sub-group."""
    optimizer_step: int
    groups: list[dict[str, Any]]
    """Settings of each parameter group."""
    decays: list[float]
    replicated: dict[str, Tensor]
    """Persistent buffers and frozen parameters, whole, equal on all ranks."""

    @property
    def moments(self) -> list[str]:
        """Names of the optimizer's moments."""
        return [kind for kind in self.tensors if kind != "master" and not kind.startswith("ema_")]


class MasterWeights:
    """One rank's fp32 master weights and moments inside a DeepSpeed optimizer."""

    def __init__(
        self,
        optimizer: Any,
        module: nn.Module,
        settings: OptimizerSettings,
        stage: int,
        rank: int,
        world: int,
    ) -> None:
        """Find the tensors in `optimizer`, which is DeepSpeed's for the ZeRO stage.

        Raises:
            AssertionError: if the master weights are not fp32.
        """
        # By identity: DeepSpeed's groups have the parameters themselves, without their names.
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.rank = rank
        self.inner: torch.optim.Optimizer = optimizer.optimizer
        self._optimizer = optimizer
        self._moments = settings.moments
        self._compute: list[Tensor] = []
        self._param_groups = self.inner.param_groups

        if stage == 3:
            groups = optimizer.fp16_groups
            self.tensors: list[Tensor] = optimizer.fp32_partitioned_groups_flat
            self._compute = optimizer.fp16_partitioned_groups_flat
            # ZeRO-3 cuts a large parameter group into several sub-groups, which share its settings.
            indices = [optimizer.sub_group_to_group_id[index] for index in range(len(groups))]
            self._param_groups = [self.inner.param_groups[index] for index in indices]
        elif hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 has a class of its own
            groups, self.tensors = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            groups = optimizer.round_robin_bit16_groups
            self.tensors = optimizer.single_partition_of_fp32_groups

        layout_groups: list[list[Parameter]] = []
        for group in groups:
            # A partitioned parameter is empty; its shape is `ds_shape`.
            layout_groups.append([(names[id(p)], tuple(getattr(p, "ds_shape", p.shape))) for p in group])
        self.layout = Layout(
            world=world,
            partition="parameter" if stage == 3 else "flat",
            groups=layout_groups,
            lengths=[tensor.numel() for tensor in self.tensors],
        )

        # The attributes above are internal to DeepSpeed: another version may mean other tensors by them.
        wrong = {tensor.dtype for tensor in self.tensors} - {torch.float32}
        if wrong:
            raise AssertionError(f"master weights are {wrong}, not fp32")

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights to the weights that the network computes with, on every rank. Collective.

        ZeRO-3 keeps some parameters gathered after a forward pass, so they are partitioned before and
        gathered after.
        """
        if not self._compute:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for compute, master in zip(self._compute, self.tensors, strict=True):
            compute.copy_(master)
        self._optimizer.checkpoint_event_epilogue()
        order_gathers(self._optimizer)

    @torch.no_grad()
    def fill(self, value: Callable[[str, int, int], Tensor], names: Sequence[str] | None = None) -> None:
        """Set the master weights.

        Args:
            value: called as `value(name, start, stop)` for elements [start, stop) of a flattened parameter.
            names: the parameters to set; None = all, and padding becomes 0.
        """
        if names is None:
            # Padding included: it is stored in checkpoints, whose bytes must not depend on old memory.
            for tensor in self.tensors:
                tensor.zero_()
        for extent in self.layout.extents_of_rank(self.rank):
            if names is None or extent.name in names:
                target = self.tensors[extent.group][extent.offset : extent.offset + extent.length]
                target.copy_(value(extent.name, extent.start, extent.start + extent.length))

    def moments(self) -> dict[str, list[Tensor]]:
        """Return the optimizer's moments by name, one flat tensor per sub-group.

        They are zeros if no step was made yet, and an empty tensor for a sub-group whose parameters do not
        have the moment.
        """
        for master, group in zip(self.tensors, self._param_groups, strict=True):
            # Torch makes this state in the first step. A checkpoint is loaded before it, and needs tensors to
            # fill.
            state = self.inner.state[master]
            if not state:
                # AdamW's fused kernels want the step count on the device.
                on_device = group.get("fused") or group.get("capturable")
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=master.device if on_device else "cpu"
                )
                for name in self._moments[group["name"]]:
                    state[name] = torch.zeros_like(master, requires_grad=False)

        names = dict.fromkeys(chain.from_iterable(self._moments.values()))
        states = [self.inner.state[master] for master in self.tensors]
        empty = torch.empty(0)

        found = {}
        for name in names:
            found[name] = [state.get(name, empty) for state in states]
        return found

    @property
    def step(self) -> int:
        """Number of applied optimizer steps; 0 for an optimizer that does not count them.

        Raises:
            AssertionError: if the sub-groups disagree.
        """
        steps = {
            int(self.inner.state[master].get("step", 0))
            for master in self.tensors
            if master in self.inner.state
        } or {0}
        if len(steps) > 1:
            raise AssertionError(f"sub-groups disagree on the optimizer step: {sorted(steps)}")
        return steps.pop()

    @step.setter
    def step(self, value: int) -> None:
        # Makes the state if there was no step yet.
        self.moments()
        for master in self.tensors:
            if "step" in self.inner.state[master]:
                self.inner.state[master]["step"].fill_(value)


def check_names(
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    source: str,
    new_branches: Sequence[str] = (),
) -> list[str]:
    """Compare the network's parameters with those of a file.

    Args:
        wanted: shapes of the network's parameters by name.
        given: shapes of the file's.
        source: how error messages call the file.
        new_branches: modules or parameters, such as `fusion`, that may be missing from the file as a whole.
            Branches of such a module may be missing too, its children and the elements of lists below it, but
            no part of a branch.

    Returns:
        The parameters that belong to new branches.

    Raises:
        UserError: if parameters are missing, superfluous, or have another shape; the message names them.
    """
    # Missing names come first, as the clearest sign of other settings; shapes are compared last.
    absent = [name for name in wanted if name not in given]
    new, missing = [], []
    for name in absent:
        is_new = any(_in_new_branch(name, given, path) for path in new_branches)
        (new if is_new else missing).append(name)
    if missing:
        raise UserError(
            f"{source}: lacks {_first_names(missing)}: "
            "use the model and fusion settings that it was made with"
        )

    superfluous = [name for name in given if name not in wanted]
    if superfluous:
        raise UserError(
            f"{source}: the network has no {_first_names(superfluous)}: "
            "use the model and fusion settings that it was made with"
        )

    for name, shape in wanted.items():
        # Names of new branches are not in `given`.
        if name in given and tuple(given[name]) != tuple(shape):
            raise UserError(
                f"{source}: {name} has shape {tuple(given[name])}, not {tuple(shape)}: "
                "use the settings it was made with"
            )
    return new


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_new_branch(name: str, given: Mapping[str, Any], path: str) -> bool:
    """Return True if the absent `name` is in a branch at or below `path` of which `given` has nothing."""
    if not f"{name}.".startswith(f"{path}."):
        return False
    if name == path:
        return True

    parts, depth = name.split("."), path.count(".") + 1
    # Branches: the module itself, its children, and elements of lists at any depth, which have numbers as
    # names.
    ends = [end for end in range(depth, len(parts)) if end <= depth + 1 or parts[end - 1].isdigit()]
    branches = [".".join(parts[:end]) + "." for end in ends]
    empty = [branch for branch in branches if not _has_prefix(given, branch)]
    return bool(empty)


def _has_prefix(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)
