"""The place of every element of every parameter among the ranks, and moves from one layout to another.

Pure integer arithmetic, no tensors: the checkpoint and the engine move the bytes.

There are two ways to partition a sub-group of parameters over W ranks, each rank holding one flat tensor:
- `parameter` (ZeRO-3): every parameter is cut into W pieces of ceil(numel / W) elements, the last one padded;
  a rank's flat tensor is the concatenation of its pieces.
- `flat` (ZeRO-1 and 2): the parameters are concatenated and padded, and the whole is cut into W equal pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

Parameter = tuple[str, tuple[int, ...]]
"""Name and shape."""


@dataclass(frozen=True)
class Extent:
    """Consecutive elements of a parameter that are also consecutive in one rank's flat tensor."""

    rank: int
    group: int
    offset: int
    """First element in the rank's flat tensor of the sub-group."""
    name: str
    start: int
    """First element in the flattened parameter."""
    length: int


class _Place(NamedTuple):
    """Place of a whole parameter in its sub-group."""

    group: int
    offset: int
    """First element in every rank's flat tensor (`parameter`), or in the concatenation of all ranks'
    (`flat`)."""
    name: str
    numel: int
    per_rank: int
    """Elements of one rank's piece: of the parameter (`parameter`), or of the sub-group (`flat`)."""


@dataclass(frozen=True)
class Layout:
    """The partition of a set of parameters among ranks."""

    world: int
    partition: Literal["parameter", "flat"]
    groups: list[list[Parameter]]
    """The parameters of each sub-group, in the order of the flat tensor."""
    lengths: list[int]
    """Elements of one rank's flat tensor of each sub-group, padding included."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {name: shape for group in self.groups for name, shape in group}

    def _places(self) -> Iterator[_Place]:
        for index, group in enumerate(self.groups):
            offset = 0
            for name, shape in group:
                numel = prod(shape)
                if self.partition == "parameter":
                    per_rank = -(-numel // self.world)
                    # Rounded up: DeepSpeed pads each parameter to a multiple of the number of ranks.
                    yield _Place(index, offset, name, numel, per_rank)
                    offset += per_rank
                else:
                    yield _Place(index, offset, name, numel, self.lengths[index])
                    offset += numel

    @cached_property
    def _index(self) -> dict[str, _Place]:
        return {place.name: place for place in self._places()}

    def extents(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """Yield the extents of elements [start, stop) of a flattened parameter, in order."""
        place = self._index[name]
        stop = place.numel if stop is None else stop

        while start < stop:
            # `inside`: first element in the piece of its rank.
            if self.partition == "parameter":
                rank, inside = divmod(start, place.per_rank)
                offset = place.offset + inside
            else:
                rank, inside = divmod(place.offset + start, place.per_rank)
                offset = inside

            # An extent ends with the request or with its rank's piece, and the next one begins on the next
            # rank.
            length = min(stop - start, place.per_rank - inside)
            yield Extent(rank, place.group, offset, name, start, length)
            start += length

    def extents_of_rank(self, rank: int) -> Iterator[Extent]:
        """Yield everything that a rank's flat tensors hold, except padding."""
        for place in self._places():
            # Elements of this rank, counted from the parameter's first (`parameter`) or from the sub-group's
            # (`flat`).
            first, last = rank * place.per_rank, (rank + 1) * place.per_rank
            if self.partition == "parameter":
                start, stop, offset = first, min(place.numel, last), place.offset
            else:
                start, stop = max(0, first - place.offset), min(place.numel, last - place.offset)
                offset = place.offset + start - first

            # A small parameter may have nothing on the later ranks.
            if start < stop:
                yield Extent(rank, place.group, offset, place.name, start, stop - start)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a manifest."""
        return {
            "world": self.world,
            "partition": self.partition,
            "groups": self.groups,
            "lengths": self.lengths,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Layout":
        """Read what `to_json` wrote."""
        groups: list[list[Parameter]] = []
        for group in record["groups"]:
            groups.append([(name, tuple(shape)) for name, shape in group])  # JSON has no tuples
        return cls(record["world"], record["partition"], groups, record["lengths"])


def moves(old: Layout, new: Layout, rank: int) -> Iterator[tuple[Extent, Extent]]:
    """Yield (source, target) extents of equal length that fill `rank`'s flat tensors of `new` from `old`.

    Every element that the rank holds is filled exactly once, except of parameters that `old` does not have.
    """
    known = old.shapes
    for target in new.extents_of_rank(rank):
        # A branch that is new in this stage keeps its starting weights.
        if target.name not in known:
            continue
        for source in old.extents(target.name, target.start, target.start + target.length):
            offset = target.offset + source.start - target.start
            yield source, Extent(rank, target.group, offset, target.name, source.start, source.length)
