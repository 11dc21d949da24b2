"""Settings of the objective, and of the times of a sample's patches."""

from dataclasses import dataclass, field
from typing import Any, Literal

from model.common.settings import bounded


@dataclass
class PatchTimesConfig:
    """Times of the patches of a sample, which may differ (Patch Forcing, arXiv 2604.19141)."""

    kind: Literal["shared", "ltg"] = "shared"
    """`shared`: one time per sample; `ltg`: the objective's time for the cleanest patch, and each patch at
    random between it and pure noise."""
    levels: int = bounded(16, 1, 1_024)
    """Different times of a sample with `ltg`; its patches are spread over them. 1 = one time per sample."""
    text_time: Literal["mean", "cleanest"] = "mean"
    """The one time that the text side reads: mean over the patches, or that of the cleanest patch."""


@dataclass
class ObjectiveConfig:
    """The target that the network learns to predict."""

    name: str = "flow"
    """A name of `pipeline.diffusion.objective.OBJECTIVES`. `flow`: rectified flow, velocity; `ddpm`: the
    paper's epsilon-prediction (appendix A.1)."""
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    """Density of t for `flow`; `ddpm` samples its 1,000 steps uniformly."""
    logit_mean: float = bounded(0.0, -100.0, 100.0)
    """Mean of logit(t) for `logit_normal`."""
    logit_std: float = bounded(1.0, 0.0, 100.0)
    """Standard deviation of logit(t)."""
    shift: float = bounded(1.0, 0.001, 1_000.0)
    """Resolution shift of t toward noise: t -> shift t / (1 + (shift - 1) t)."""
    patch_times: PatchTimesConfig = field(default_factory=PatchTimesConfig)
    """Times of a sample's patches."""
    difficulty: float = bounded(0.0, 0.0, 1_000.0)
    """Weight of the loss of the difficulty head, which predicts each patch's error; 0 = none. The paper of
    Patch Forcing takes 0.01."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the objective that are not among the fields above."""

    @property
    def time_levels(self) -> int:
        """Number of times of a sample in training."""
        return 1 if self.patch_times.kind == "shared" else self.patch_times.levels
