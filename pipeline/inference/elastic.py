"""Choice of the parts of an elastic network for sampling."""

from dataclasses import dataclass, replace

from model.common.errors import UserError
from model.config import DiTConfig
from model.dit import LIDiT
from model.elastic.network import ElasticLIDiT
from model.sub_network import Part, PatchSchedule


@dataclass(frozen=True)
class ChosenParts:
    """Depths and sizes of patches that are asked for; None = as trained for."""

    depth: int | None = None
    patch: int | None = None
    null_depth: int | None = None
    """Depth for the branch of guidance without the prompt; None = that of the prompt's branch."""
    null_patch: int | None = None
    """Its size of patches."""

    def record(self) -> dict[str, int]:
        """Return what is asked for, as it is written next to an image."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Parts:
    """The parts that evaluate the two branches of guidance; None = the full network."""

    prompt: Part | None = None
    null: Part | None = None


def choose_parts(network: LIDiT, chosen: ChosenParts) -> Parts:
    """Return the parts of a network that sample.

    Raises:
        UserError: if the network has no such parts.
    """
    if not isinstance(network, ElasticLIDiT):
        if named := chosen.record():
            raise UserError(f"{next(iter(named))}: this network is not elastic: leave it out")
        return Parts()

    config, sizes = network.elastic_config, network.sizes
    prompt = config.choose(sizes, chosen.depth, chosen.patch)
    if chosen.null_depth is None and chosen.null_patch is None:
        return Parts(prompt, prompt)

    depth = chosen.depth if chosen.null_depth is None else chosen.null_depth
    patch = chosen.patch if chosen.null_patch is None else chosen.null_patch
    return Parts(prompt, config.choose(sizes, depth, patch))


def part_choices(network: LIDiT) -> dict[str, ChosenParts]:
    """Return all parts that a network can be sampled with, by name, the default first; none of a plain
    network."""
    if not isinstance(network, ElasticLIDiT):
        return {}

    choices = {}
    for part in network.elastic_config.choices(network.sizes):
        patch = None if isinstance(part, PatchSchedule) else part.patch
        choices[str(part)] = ChosenParts(part.depth, patch)
    return choices


def largest_patch(network: LIDiT, parts: Parts) -> int:
    """Return the largest side of a patch that the parts have, by which the latents have to divide."""
    return max(_patch_of(part, network.sizes) for part in (parts.prompt, parts.null))


def sizes_for_solver(network: LIDiT, parts: Parts, follows_patches: bool) -> DiTConfig:
    """Return the network's sizes with the patches that a solver sees.

    Args:
        network: that samples.
        parts: of it.
        follows_patches: True for a solver that reads the expected error of each patch.

    Raises:
        UserError: if such a solver would see patches of several sizes.
    """
    if not follows_patches:
        return network.sizes

    several = [part for part in (parts.prompt, parts.null) if isinstance(part, PatchSchedule)]
    patch = _patch_of(parts.prompt, network.sizes)
    if several or patch != _patch_of(parts.null, network.sizes):
        raise UserError(
            "this scheduler follows the error of patches of one size: take another scheduler, or parts with "
            "the same patches"
        )
    return replace(network.sizes, patch=patch)


def _patch_of(part: Part | None, sizes: DiTConfig) -> int:
    """Return a part's largest patch."""
    if part is None:
        return sizes.patch
    return max(part.patches) if isinstance(part, PatchSchedule) else part.patch
