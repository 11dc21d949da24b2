"""Settings of an elastic network, and the blocks that each of its depths keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

from model.common.errors import UserError
from model.common.settings import bounded, within
from model.config import DiTConfig
from model.sub_network import Part, PatchSchedule, SubNetwork


@dataclass
class ElasticConfig:
    """Depths and sizes of patches that one set of weights is trained for (after ElasticDiT, arXiv
    2605.15684)."""

    depths: list[int] = field(default_factory=list, metadata=within(1, 1_000))
    """Numbers of blocks, falling from `model.depth`, such as [28, 20, 14]; each depth keeps some of the
    blocks of the one before it. Empty = all blocks always."""
    patches: list[int] = field(default_factory=list, metadata=within(1, 1_024))
    """Sides of a patch, rising from `model.patch`, such as [2, 4]; each has its own first and last layers.
    Empty = `model.patch` alone."""
    full: float = bounded(0.5, 0.0, 1.0)
    """Share of the steps that train the full network; the others train one of its parts, all alike often."""
    sandwich: bool = False
    """True = each step trains the full network, and then a part of it on the same samples; `full` is not
    read."""
    distil: float = bounded(0.0, 0.0, 1.0)
    """With `sandwich`: share of the part's loss that compares it with the full network's prediction instead
    of the objective's target."""
    part_weight: float = bounded(1.0, 0.0, 100.0)
    """With `sandwich`: weight of the part's loss beside the full network's. Below 1 the full network loses
    less quality to its parts, which learn less."""
    segments: list[float] = field(default_factory=list, metadata=within(0.0, 1.0))
    """Times, rising, at which the next larger patches begin, one fewer than `patches`: each size is trained
    and sampled in its part of the times alone. Empty = all sizes at all times."""
    hold: int = bounded(1, 1, 1_000_000)
    """Steps in a row with the same part: ZeRO-3 gathers ahead only what the step before has used."""

    @property
    def elastic(self) -> bool:
        """True if there is more than one depth or size."""
        return len(self.depths) > 1 or len(self.patches) > 1

    def check(self, sizes: DiTConfig) -> None:
        """Compare the settings with one another and with the sizes of the network.

        Raises:
            UserError: if they do not fit together.
        """
        if self.depths and self.depths[0] != sizes.depth:
            raise UserError(
                f"elastic.depths={self.depths}: the first is the whole network: begin with "
                f"model.depth={sizes.depth}"
            )

        if any(one <= other for one, other in pairwise(self.depths)) or 1 in self.depths[1:]:
            raise UserError(
                f"elastic.depths={self.depths}: name each depth once, the largest first and none below 2"
            )

        if self.patches and self.patches[0] != sizes.patch:
            raise UserError(
                f"elastic.patches={self.patches}: the first is the size of the whole network: begin with "
                f"model.patch={sizes.patch}"
            )

        rising = all(one < other for one, other in pairwise(self.patches))
        if not rising or any(patch % sizes.patch for patch in self.patches):
            raise UserError(
                f"elastic.patches={self.patches}: name rising multiples of model.patch={sizes.patch}"
            )

        self._check_training()

    def _check_training(self) -> None:
        """Compare the settings of training with one another."""
        if self.sandwich and not self.elastic:
            raise UserError("elastic.sandwich trains a part after the whole: name elastic.depths or patches")
        if self.distil and not self.sandwich:
            raise UserError("elastic.distil needs the full network's prediction: set elastic.sandwich=true")
        if self.part_weight != 1.0 and not self.sandwich:
            raise UserError(
                "elastic.part_weight weighs the part that follows the full network: set elastic.sandwich=true"
            )
        if not self.segments:
            return

        rising = all(one < other for one, other in pairwise([0.0, *self.segments, 1.0]))
        if len(self.segments) != len(self.patches) - 1 or not rising:
            raise UserError(
                f"elastic.segments={self.segments}: name {max(len(self.patches) - 1, 0)} rising times "
                "between 0 and 1, one fewer than elastic.patches"
            )
        if self.sandwich and len(self.depths) < 2:
            raise UserError(
                "elastic.sandwich with elastic.segments: the part has the patches of the whole, so it needs "
                "another depth: name elastic.depths"
            )

    def whole(self, sizes: DiTConfig) -> SubNetwork:
        """Return the full network."""
        return SubNetwork(sizes.depth, sizes.patch)

    def parts(self, sizes: DiTConfig) -> list[SubNetwork]:
        """Return all parts, the full network first."""
        depths, patches = self.depths or [sizes.depth], self.patches or [sizes.patch]
        return [SubNetwork(depth, patch) for patch, depth in product(patches, depths)]

    def choices(self, sizes: DiTConfig) -> list[Part]:
        """Return all that the network can be sampled with, the default first."""
        if not self.segments:
            return [*self.parts(sizes)]
        patches, times = tuple(self.patches), tuple(self.segments)
        return [PatchSchedule(depth, patches, times) for depth in self.depths or [sizes.depth]]

    def by_default(self, sizes: DiTConfig) -> Part | None:
        """Return what computes if nothing else is asked for: all blocks, with patches by the time if they
        were trained so; None = the full network."""
        if not self.segments:
            return None
        return PatchSchedule(sizes.depth, tuple(self.patches), tuple(self.segments))

    def choose(self, sizes: DiTConfig, depth: int | None, patch: int | None) -> Part | None:
        """Return the part of a depth and a size of patches; None for either = as trained for.

        Raises:
            UserError: if the network was not trained for it.
        """
        if depth is None and patch is None:
            return self.by_default(sizes)

        depths, patches = self.depths or [sizes.depth], self.patches or [sizes.patch]
        for name, value, known in (("depth", depth, depths), ("patch", patch, patches)):
            if value is not None and value not in known:
                raise UserError(
                    f"{name} {value}: the network was trained for {name} {', '.join(map(str, known))}: "
                    "choose one of them"
                )

        depth = depths[0] if depth is None else depth
        if not self.segments:
            return SubNetwork(depth, patches[0] if patch is None else patch)
        if patch is not None:
            raise UserError(
                f"patch {patch}: the network was trained with each size in its part of the times "
                f"(elastic.segments={self.segments}): leave it out"
            )

        return PatchSchedule(depth, tuple(patches), tuple(self.segments))


def kept_blocks(depths: Sequence[int]) -> dict[int, list[int]]:
    """Return the numbers of the blocks that each depth keeps, from 0.

    The blocks of a depth are chosen evenly from those of the depth before it, the first and the last always
    among them.

    Args:
        depths: falling, the first is the number of all blocks; all others are at least 2.
    """
    blocks = list(range(depths[0]))
    kept = {depths[0]: blocks}

    for depth in depths[1:]:
        step = (len(blocks) - 1) / (depth - 1)
        blocks = [blocks[round(number * step)] for number in range(depth)]
        kept[depth] = blocks
    return kept
