"""The interface of an objective, which is what the network learns to predict, and the registry of
objectives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from model.common.errors import UserError
from model.common.registry import Registry
from model.condition import Levels
from model.functional import fill_patches
from pipeline.diffusion.difficulty import difficulty_loss
from pipeline.stage.objective import ObjectiveConfig

SampleNormal = Callable[[str, Sequence[int]], Tensor]
"""(name of the numbers' purpose, shape of one sample's) -> normal numbers fp32 [B, *shape] from each sample's
own generator."""


@dataclass
class TrainingExample:
    """A batch as the objective gives it to the network, and what the network has to predict."""

    noisy: Tensor
    """fp32 [B, C, ...]"""
    timesteps: Tensor
    """fp32 [B] in [0, 1]; with `levels`, [B, K]; or [B, N], one for each patch."""
    target: Tensor
    """fp32 [B, C, ...]"""
    levels: Levels | None = None
    """The level of each patch, if patches share a few times."""


class Objective(ABC):
    """Makes what the network reads and what it has to predict from clean latents and noise.

    Another objective is one file with a class that fills this interface in. Settings that `ObjectiveConfig`
    has no field for come in `config.settings`.
    """

    schedulers: ClassVar[Mapping[str, Callable[[ObjectiveConfig], Any]]]
    """diffusers schedulers that sample from a network with this objective, by name; the first is the
    default."""

    patch_times: ClassVar[bool] = False
    """True if patches of a sample may differ in time: the objective follows `objective.patch_times`, and has
    a scheduler `euler`, which the solvers in `pipeline/diffusion/adaptive.py` build on."""

    def __init__(self, config: ObjectiveConfig, patch: Sequence[int] = (1, 1)) -> None:
        """Keep the settings.

        Args:
            config: settings of the objective.
            patch: latent positions of a patch along each axis, for objectives whose timesteps differ from
            patch to patch.
        """
        self.config = config
        self.patch = patch

    @abstractmethod
    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Map `u` [B], uniform in [0, 1), to timesteps fp32 [B] in [0, 1], where 1 is the noisiest."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clean latents [B, C, ...] with noise at `timesteps`, [B] or [B, N].

        Returns:
            The noisy latents and what the network has to predict, both fp32 [B, C, ...].
        """

    def training_example(
        self, clean: Tensor, noise: Tensor, u: Tensor, normal: SampleNormal
    ) -> TrainingExample:
        """Make a batch of training examples.

        Args:
            clean: normalized latents fp32 [B, C, ...].
            noise: normal numbers fp32 [B, C, ...].
            u: uniform numbers fp32 [B] in [0, 1).
            normal: gives further normal numbers, which depend on (seed, epoch, sample id) alone.
        """
        timesteps = self.sample_timesteps(u)
        noisy, target = self.add_noise(clean, noise, timesteps)
        return TrainingExample(noisy, timesteps, target)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample, fp32 [B]: the mean squared error."""
        # Per sample and not per batch: the trainer also sorts the losses into bins of timesteps.
        return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)

    def training_losses(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses to learn from and those to report, fp32 [B] each.

        They differ by the loss of the difficulty head, if one is trained: the prediction then has a channel
        of log-variances, [B, C + 1, ...].
        """
        weight = self.config.difficulty
        if not weight:
            losses = self.loss(prediction, target)
            return losses, losses
        channels = target.shape[1]
        prediction, log_variance = prediction[:, :channels], prediction[:, channels:]
        losses = self.loss(prediction, target)
        return losses + weight * difficulty_loss(prediction, log_variance, target, self.patch), losses

    def per_position(self, values: Tensor, latents: Tensor) -> Tensor:
        """Return values [B] or [B, N] (one per patch) in a shape that broadcasts over latents [B, C, ...]."""
        if values.dim() == 1:
            return values.view(-1, *[1] * (latents.dim() - 1))
        return fill_patches(values, self.patch, latents.shape[2:])  # [B, 1, ...]


OBJECTIVES: Registry[type[Objective]] = Registry("objective.name")
"""Objectives by the name that `objective.name` gives."""


def make_objective(config: ObjectiveConfig, patch: Sequence[int] = (1, 1)) -> Objective:
    """Build the objective that a stage names.

    Args:
        config: settings of the objective.
        patch: latent positions of a patch along each axis.

    Raises:
        UserError: if there is no objective of that name, or it has one time for all patches and the settings
            ask for more.
    """
    objective = OBJECTIVES[config.name]
    if config.patch_times.kind != "shared" and not objective.patch_times:
        raise UserError(
            f"objective.name={config.name} has one time for all patches of a sample: leave "
            f"objective.patch_times.kind={config.patch_times.kind} out, or set objective.name=flow"
        )
    return objective(config, patch)
