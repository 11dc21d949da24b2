"""Metrics of a run: JSONL always, TensorBoard by default, W&B on request."""

import importlib
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.common.errors import UserError
from model.common.files import naming_full_disk
from pipeline.runtime.json_lines import append_line
from pipeline.stage.config import LogConfig

TIMESTEP_BINS = 4
"""Losses are also reported in this many equal bins of t."""

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}
"""Dense bf16 peaks by a part of the device's name, TFLOP/s."""


def peak_flops(log: LogConfig) -> float | None:
    """Return the peak FLOP/s of this rank's device, or None if it is not known (then no MFU is reported)."""
    # The stage's value comes first: power limits and unknown devices make the table's wrong.
    if log.peak_tflops is not None:
        return log.peak_tflops * 1e12
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gb() -> float:
    """Return the most memory that this rank has used so far, in GiB: of its GPU, or of the process if it has
    none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts `ru_maxrss` in KiB, so this is GiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Interval:
    """Sums over the steps since the last report; kept in checkpoints, so that a resumed run reports the same
    numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Add `weight` observations of mean `value`."""
        # A mean of no observations must not make an entry, whose count would then divide by zero.
        if weight:
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Return the mean of each quantity, and start over."""
        means = {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}
        self.__init__()
        return means

    def to_dict(self) -> dict[str, Any]:
        """Return the sums as JSON values."""
        return {"sums": self.sums, "counts": self.counts}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Interval":
        """Read back what `to_dict` returned."""
        interval = cls()
        interval.sums, interval.counts = dict(record["sums"]), dict(record["counts"])
        return interval


def bins_of(timesteps: Tensor) -> Tensor:
    """Return the bin of each timestep, int64 of the same shape."""
    # t = 1 belongs to the last bin, not to a fifth.
    return (timesteps * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)


class RankSums:
    """Sums and counts of named quantities on this rank's device, to be added up over the ranks once in a
    while."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.columns = {name: column for column, name in enumerate(names)}
        self._table = torch.zeros(2, len(names), dtype=torch.float64, device=device)

    def add(self, name: str, values: Tensor) -> None:
        """Add observations of one quantity; nothing waits for the device."""
        # fp64, since sums over many steps in fp32 would lose the small values.
        self._table[0, self.columns[name]] += values.double().sum()
        self._table[1, self.columns[name]] += values.numel()

    def add_losses(self, losses: Tensor, timesteps: Tensor) -> None:
        """Add per-sample losses [B] to the bins `loss_t<i>` of their timesteps [B]; of [B, N], the mean
        counts."""
        if timesteps.dim() > 1:
            timesteps = timesteps.mean(dim=1)
        columns = self.columns["loss_t0"] + bins_of(timesteps)  # the bins are neighboring columns
        # `index_add_` instead of indexing: several samples of a batch fall into one bin.
        self._table[0].index_add_(0, columns, losses.double())
        self._table[1].index_add_(0, columns, torch.ones_like(losses, dtype=torch.float64))

    def take(self) -> dict[str, tuple[float, float]]:
        """Return mean and count of each quantity over all ranks, and start over. Collective."""
        # A copy, because the sum over the ranks is written in place, and this rank's own sums start over.
        table = self._table.clone()
        self._table.zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(table)
        # One transfer for all quantities: each would wait for the device.
        totals, counts = table.tolist()
        return {
            name: (totals[at] / counts[at] if counts[at] else 0.0, counts[at])
            for name, at in self.columns.items()
        }


def _import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise UserError(
            f"log.wandb is set, but the package {error.name} is missing: pip install wandb"
        ) from error


class MetricsLog:
    """Writes the reports of rank 0; on other ranks it does nothing."""

    def __init__(self, run: Path, log: LogConfig, stage_yaml: str, samples: int, writes: bool) -> None:
        """Open what the stage asks for.

        Args:
            run: the run's folder.
            log: the stage's settings of it.
            stage_yaml: the stage, shown beside the curves.
            samples: samples that the run has trained on; what was written about later ones was lost in a
                crash, and comes again.
            writes: False = write nothing.
        """
        self._path = run / "metrics.jsonl" if writes else None
        self._board = run / "tensorboard"
        self._tensorboard = None
        self._wandb = None
        if writes and log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

            with naming_full_disk(self._board):
                # Readers then drop all points from this one on that were written earlier.
                self._tensorboard = SummaryWriter(str(self._board), purge_step=samples + 1)
                self._tensorboard.add_text("stage", f"```yaml\n{stage_yaml}\n```")
        if writes and log.wandb:
            self._wandb = _import_wandb().init(
                # A fixed id with `resume`: all starts of a run make one curve.
                project=log.wandb,
                name=run.name,
                id=run.name,
                resume="allow",
                dir=str(run),
            )

    def event(self, name: str, **fields: Any) -> None:
        """Write one line about something that happened: start, save, stop."""
        if self._path is not None:
            append_line(self._path, {"event": name, "time": time.time(), **fields})

    def report(self, step: int, samples: int, values: dict[str, float]) -> None:
        """Write the numbers of an interval that ended after `step` steps and `samples` samples."""
        if self._path is None:
            return
        # JSON has no NaN or infinity: strict readers would refuse the whole line.
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        append_line(self._path, {"step": step, "samples": samples, "time": time.time(), **finite})
        self._curves(step, samples, values)

    def scores(self, name: str, step: int, samples: int, values: dict[str, float]) -> None:
        """Write the scores of an evaluation: an event in the file, one curve `<name>/<key>` per score
        elsewhere."""
        if not values:
            return
        self.event(name, step=step, samples=samples, **values)
        self._curves(step, samples, {f"{name}/{key}": value for key, value in values.items()})

    def _curves(self, step: int, samples: int, values: dict[str, float]) -> None:
        if self._tensorboard is not None:
            with naming_full_disk(self._board):
                for key, value in values.items():
                    # Over samples and not steps, so that runs with different batch sizes can be compared.
                    self._tensorboard.add_scalar(key, value, samples)
        if self._wandb is not None:
            # W&B drops what is logged for an earlier step than its last one, so steps that were lost in a
            # crash and trained again, which repeats their numbers, are there once.
            self._wandb.log({"samples": samples, **values}, step=step)

    def image(self, name: str, pixels: Any, samples: int) -> None:
        """Write an image, uint8 [H, W, 3]."""
        if self._tensorboard is not None:
            with naming_full_disk(self._board):
                self._tensorboard.add_image(name, pixels, samples, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        if self._tensorboard is not None:
            with naming_full_disk(self._board):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
