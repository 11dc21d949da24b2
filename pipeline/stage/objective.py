"""Settings of the objective, and of the times of a sample's patches."""

import math
from dataclasses import dataclass, field, replace
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
    shift_positions: int | None = bounded(None, 1, 10**12)
    """Positions of the latents that `shift` is for, such as 1,024 for 32 x 32: a bucket of n times as many is
    shifted by sqrt(n) times as much. None = `shift` in all buckets."""
    patch_times: PatchTimesConfig = field(default_factory=PatchTimesConfig)
    """Times of a sample's patches."""
    first_frame: float = bounded(0.0, 0.0, 1.0)
    """Share of the clips whose first frame is given in training, so that images can be set in motion
    (`pipeline.sample --first-frame`); 0 = none."""
    difficulty: float = bounded(0.0, 0.0, 1_000.0)
    """Weight of the loss of the difficulty head, which predicts each patch's error; 0 = none. The paper of
    Patch Forcing takes 0.01."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the objective that are not among the fields above."""

    def at_size(self, positions: int) -> "ObjectiveConfig":
        """Return the settings for latents of `positions` positions, with the shift that they get."""
        if self.shift_positions is None:
            return self
        # Stable Diffusion 3 (Esser et al. 2024), section 5.3.2: the noise that hides as much of an image
        # grows with the root of its positions.
        shift = self.shift * math.sqrt(positions / self.shift_positions)
        return replace(self, shift=shift, shift_positions=None)

    @property
    def time_levels(self) -> int:
        """Number of times of a sample in training."""
        if self.patch_times.kind != "shared":
            return self.patch_times.levels
        # a given frame is at time 0, the others at the sample's
        return 2 if self.first_frame else 1
