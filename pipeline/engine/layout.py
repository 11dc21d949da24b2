"""Which rank holds which elements of which parameter, and how shards of one world size fill those of another.

Pure integer maths, no tensors: the checkpoint and the engine move the bytes.

Two ways to shard a sub-group of parameters over W ranks, each rank holding one flat tensor:
- `parameter` (ZeRO-3): every parameter is cut into W pieces of ceil(numel / W) elements, the last one padded; a rank's
  flat tensor is the concatenation of its pieces.
- `flat` (ZeRO-1 and 2): the parameters are concatenated, padded, and the whole is cut into W equal pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

Parameter = tuple[str, tuple[int, ...]]
"""Name and shape."""


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a parameter that lie consecutively in one rank's flat tensor."""

    rank: int
    group: int
    offset: int
    """First element in the rank's flat tensor of the sub-group."""
    name: str
    start: int
    """First element in the flattened parameter."""
    length: int


@dataclass(frozen=True)
class Layout:
    """How one set of parameters is sharded."""

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

    def _places(self) -> Iterator[tuple[int, int, str, int, int]]:
        """Sub-group, offset, name, numel and elements per rank of each parameter, in order."""
        for index, group in enumerate(self.groups):
            offset = 0
            for name, shape in group:
                numel = prod(shape)
                piece = -(-numel // self.world) if self.partition == "parameter" else self.lengths[index]
                yield index, offset, name, numel, piece
                offset += piece if self.partition == "parameter" else numel

    def runs(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Where elements [start, stop) of a parameter lie, in order."""
        group, offset, _, numel, piece = self._index[name]
        stop = numel if stop is None else stop
        while start < stop:
            if self.partition == "parameter":
                rank, inside = divmod(start, piece)
                inside, left = offset + inside, piece - inside
            else:
                rank, inside = divmod(offset + start, piece)
                left = piece - inside
            length = min(stop - start, left)
            yield Run(rank, group, inside, name, start, length)
            start += length

    def held(self, rank: int) -> Iterator[Run]:
        """What a rank's flat tensors hold, padding left out."""
        for group, offset, name, numel, piece in self._places():
            if self.partition == "parameter":
                start, stop, inside = rank * piece, min(numel, (rank + 1) * piece), offset
            else:
                start, stop = max(0, rank * piece - offset), min(numel, (rank + 1) * piece - offset)
                inside = offset + start - rank * piece
            if start < stop:
                yield Run(rank, group, inside, name, start, stop - start)

    @cached_property
    def _index(self) -> dict[str, tuple[int, int, str, int, int]]:
        return {place[2]: place for place in self._places()}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {"world": self.world, "partition": self.partition, "groups": self.groups, "lengths": self.lengths}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Layout":
        """Read back what `to_json` wrote."""
        groups = [[(name, tuple(shape)) for name, shape in group] for group in record["groups"]]
        return cls(record["world"], record["partition"], groups, record["lengths"])


def moves(old: Layout, new: Layout, rank: int) -> Iterator[tuple[Run, Run]]:
    """The (source, target) runs of equal length that fill `rank`'s flat tensors of `new` from the shards of `old`.

    Every element that the rank holds is filled exactly once; parameters that `old` does not have are left out.
    """
    known = old.shapes
    for target in new.held(rank):
        if target.name not in known:
            continue
        for source in old.runs(target.name, target.start, target.start + target.length):
            inside = target.offset + source.start - target.start
            yield source, Run(rank, target.group, inside, target.name, source.start, source.length)
