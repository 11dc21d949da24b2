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
    position: Position | None = None
    """Position of the next batch; None = the beginning."""
    interval: Interval = field(default_factory=Interval)
    """Sums since the last report."""

    def add_applied(self, norm: float) -> None:
        """Count an applied step whose gradients had this norm."""
        self.skipped_in_a_row = 0
        before = self.running_grad_norm
        self.running_grad_norm = norm if before is None else 0.99 * before + 0.01 * norm
        self.interval.add("grad_norm", norm)

    def max_norm(self, optim: OptimConfig) -> float:
        """Return the gradient norm above which a step is a spike and is skipped."""
        spike, usual = optim.spike, self.running_grad_norm
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
            position=None if position is None else Position.from_dict(position),
            interval=Interval.from_dict(record["interval"]),
        )
