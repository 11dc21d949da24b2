"""Arithmetic on an elastic network: size and FLOPs of each of its parts, and their mean in training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from model.config import DiTConfig
from model.elastic.network import PatchLayers
from model.flops import count_parameters
from pipeline.diffusion.objective import make_objective
from pipeline.stage.config import StageConfig
from pipeline.training.elastic import PartChoice


@dataclass(frozen=True)
class PartCost:
    """The cost of a part of an elastic network."""

    name: str
    parameters: int
    """Parameters of the plain network that an export of the part has."""
    flops_per_sample: float
    """Forward and backward."""
    share: float
    """Passes of this part per step; with `elastic.sandwich` they sum up to 2."""


def part_costs(
    stage: StageConfig,
    dit: DiTConfig,
    widths: Sequence[int],
    latents: Sequence[int],
    flops: Callable[[DiTConfig], float],
) -> list[PartCost]:
    """Return the costs of all parts, the full network first.

    Args:
        stage: the stage.
        dit: sizes of the full network.
        widths: width of each LLM's hidden states.
        latents: positions of a sample's latents along each axis.
        flops: FLOPs of a sample, of a network of given sizes.
    """
    choice = PartChoice(stage.elastic, dit, make_objective(stage.objective), stage.data.seed)
    shares = choice.shares(math.prod(latents))

    costs = []

    for part in stage.elastic.parts(dit):
        sizes = replace(dit, depth=part.depth, patch=part.patch)
        parameters = count_parameters(sizes, stage.fusion, widths)["total"]
        costs.append(PartCost(str(part), parameters, flops(sizes), shares.get(part, 0.0)))

    return costs


def further_parameters(stage: StageConfig, dit: DiTConfig) -> int:
    """Return the parameters that the further sizes of patches add to the full network."""
    count = 0

    for patch in stage.elastic.patches[1:]:
        # Without storage: only the sizes are read.
        with torch.device("meta"):
            layers = PatchLayers(replace(dit, patch=patch))
        count += sum(parameter.numel() for parameter in layers.parameters())
    return count
