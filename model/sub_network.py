"""The choice of a part of an elastic network: how many of its blocks, and patches of which size."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class SubNetwork:
    """A part of an elastic network, which computes as a network of its own."""

    depth: int
    """Number of blocks."""
    patch: int
    """Side of a patch, in latent positions."""

    def __str__(self) -> str:
        """Return the name in metrics, such as `depth14_patch2`."""
        return f"depth{self.depth}_patch{self.patch}"

    def at(self, time: float) -> "SubNetwork":
        """Return the part that computes at a time in [0, 1]: always itself."""
        return self


@dataclass(frozen=True)
class PatchSchedule:
    """A part of an elastic network whose size of patches depends on the time."""

    depth: int
    patches: tuple[int, ...]
    """Sizes of patches from the least noise to the most."""
    times: tuple[float, ...]
    """Rising times in (0, 1): from the i-th on, patches have size `patches[i + 1]`."""

    def __str__(self) -> str:
        """Return the name in metrics, such as `depth14`."""
        return f"depth{self.depth}"

    def at(self, time: float) -> SubNetwork:
        """Return the part that computes at a time in [0, 1]."""
        return SubNetwork(self.depth, self.patches[bisect_right(self.times, time)])


Part = SubNetwork | PatchSchedule
