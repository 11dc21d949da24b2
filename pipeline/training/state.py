"""The progress of a run: all that a checkpoint keeps beside the weights."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.data.position import Position
from pipeline.stage.config import OptimConfig
from pipeline.training.metrics import Interval


@dataclass
class TrainState:
    """Progress of a run; a resumed run continues from it exactly."""

    step: int = 0
    samples: int = 0
    """Samples trained on."""
    skipped: int = 0
    """Steps whose gradients were not applied."""
    skipped_in_a_row: int = 0
    seconds_in_steps: float = 0.0
    running_grad_norm: float | None = None
    """Exponential mean of the gradient norms of applied steps; None before the first."""
    part_grad_norms: dict[str, float] = field(default_factory=dict)
    """The same of the steps that train each part of an elastic network, by the part's name."""
    position: Position | None = None
    """Position of the next batch; None = the beginning."""
    interval: Interval = field(default_factory=Interval)
    """Sums since the last report."""

    def add_applied(self, norm: float, part: str = "") -> None:
        """Count an applied step whose gradients had this norm, of a part of the network or the whole."""
        self.skipped_in_a_row = 0
        self.running_grad_norm = _running(self.running_grad_norm, norm)
        if part:
            self.part_grad_norms[part] = _running(self.part_grad_norms.get(part), norm)
            self.interval.add(f"grad_norm_{part}", norm)
        self.interval.add("grad_norm", norm)

    def max_norm(self, optim: OptimConfig, part: str = "") -> float:
        """Return the gradient norm above which a step is a spike and is skipped."""
        # Parts of a network have norms of their own: those of another part say nothing.
        spike, usual = optim.spike, self.part_grad_norms.get(part) if part else self.running_grad_norm
        settled = self.samples >= optim.warmup_samples
        return spike * usual if spike is not None and usual is not None and settled else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds_in_steps": self.seconds_in_steps,
            "running_grad_norm": self.running_grad_norm,
            **({"part_grad_norms": self.part_grad_norms} if self.part_grad_norms else {}),
            "position": None if self.position is None else self.position.to_dict(),
            "interval": self.interval.to_dict(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TrainState":
        """Read back what `to_dict` returned; a record with further keys is one of a checkpoint."""
        position = record["position"]
        # before the key had its present name it was called `usual_norm`
        norm = record["running_grad_norm"] if "running_grad_norm" in record else record["usual_norm"]
        # Key by key, because a checkpoint's record also has others, such as the stage.
        return cls(
            step=record["step"],
            samples=record["samples"],
            skipped=record["skipped"],
            skipped_in_a_row=record["skipped_in_a_row"],
            seconds_in_steps=record["seconds_in_steps"],
            running_grad_norm=norm,
            part_grad_norms=dict(record.get("part_grad_norms", {})),
            position=None if position is None else Position.from_dict(position),
            interval=Interval.from_dict(record["interval"]),
        )


def _running(before: float | None, norm: float) -> float:
    """Return the exponential mean after one more norm."""
    return norm if before is None else 0.99 * before + 0.01 * norm
