"""Weights of elastic networks: the plain network that a part is, and how an elastic network starts from a
plain one's weights."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from model.common.errors import UserError
from model.config import DiTConfig
from model.dit import LIDiT
from model.elastic.config import ElasticConfig
from model.elastic.network import PARTS, ElasticLIDiT
from model.sub_network import SubNetwork

_OF_PATCHES = {
    "patch_embedding.": "patch_embedding.",
    "position.": "position.",
    "final.linear.": "linear.",
}
"""Beginning of a plain network's names -> of those of `PatchLayers`."""
_TIME_BIAS = "time_embedding.mlp.outer.bias"


def plain_network(network: LIDiT, depth: int | None = None, patch: int | None = None) -> LIDiT:
    """Return the plain network that a part of an elastic one is, without a trace of the others.

    Args:
        network: an elastic network, or a plain one, which is returned as it is.
        depth: number of blocks; None = all.
        patch: side of a patch; None = the full network's.

    Raises:
        UserError: if the network has no such part, or each size of patches knows only a part of the times.
    """
    if not isinstance(network, ElasticLIDiT):
        if depth is not None or patch is not None:
            raise UserError("this network is not elastic: leave out --depth and --patch")
        return network

    config, whole = network.elastic_config, network.elastic_config.whole(network.sizes)
    if config.segments:
        raise UserError(
            f"elastic.segments={config.segments}: each size of patches was trained in its part of the times "
            "alone, so none is a network of its own: sample from the run itself"
        )
    part = config.choose(network.sizes, depth, patch) or whole
    assert isinstance(part, SubNetwork)

    own = f"{PARTS}.{part.patch}."
    weights = {}
    for name, value in network.state_dict().items():
        plain = _plain_name(name, network.kept[part.depth], own, part.patch == network.sizes.patch)
        if plain is not None:
            weights[plain] = value

    if part.patch != network.sizes.patch:
        # As the forward pass adds them, in the type of the weights: so the sum has the same bits.
        weights[_TIME_BIAS] = weights[_TIME_BIAS] + network.state_dict()[f"{own}time_shift.vector"]

    with torch.device("meta"):
        sizes = replace(network.sizes.with_patch(part.patch), depth=part.depth)
        plain_one = LIDiT(sizes, network.fusion.config, network.text_widths)
    plain_one.load_state_dict(weights, assign=True)

    return plain_one.train(network.training).requires_grad_(False)


def _plain_name(name: str, kept: list[int], own: str, is_base: bool) -> str | None:
    """Return a parameter's name in the plain network of a part; None if it is not in it."""
    if name.startswith(f"{PARTS}."):
        for plain, inner in _OF_PATCHES.items():
            if name.startswith(own + inner):
                return plain + name.removeprefix(own + inner)
        return None

    if not is_base and name.startswith(tuple(_OF_PATCHES)):
        return None
    if not name.startswith("blocks."):
        return name
    _, number, rest = name.split(".", 2)

    return f"blocks.{kept.index(int(number))}.{rest}" if int(number) in kept else None


class GrownWeights(Mapping[str, Tensor]):
    """A plain network's weights, and the layers of further sizes of patches made from them.

    A larger patch starts as the mean over its positions in, and as copies out: of latents that are constant
    within the positions of a smaller patch's position, it gives what the smaller patch gives of the latents
    without the repetition.
    """

    def __init__(self, weights: Mapping[str, Tensor], sizes: DiTConfig, elastic: ElasticConfig) -> None:
        """Keep the weights, which are read when they are asked for.

        Args:
            weights: of a plain network, or of an elastic one that may have fewer sizes of patches.
            sizes: of the full network.
            elastic: sizes of patches to have.
        """
        self._weights, self._sizes = weights, sizes
        read = getattr(weights, "shapes", None)
        self.shapes = dict(read) if read else {name: tuple(value.shape) for name, value in weights.items()}
        self._made: dict[str, tuple[int, str]] = {}
        """Name -> size of patches and the plain network's name."""
        for patch in elastic.patches[1:]:
            self._grow(patch)

    def _grow(self, patch: int) -> None:
        own, values = f"{PARTS}.{patch}.", replace(self._sizes, patch=patch).patch_values
        if any(name.startswith(own) for name in self.shapes):
            return

        shift = f"{own}time_shift.vector"
        self._made[shift], self.shapes[shift] = (patch, ""), (self._sizes.width,)

        for name, shape in list(self.shapes.items()):
            for plain, inner in _OF_PATCHES.items():
                if not name.startswith(plain):
                    continue
                made = own + inner + name.removeprefix(plain)

                self._made[made], self.shapes[made] = (patch, name), shape
                if name == "patch_embedding.weight":
                    self.shapes[made] = (shape[0], values)
                elif plain == "final.linear.":
                    self.shapes[made] = (values, *shape[1:])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            return self._weights[name]
        patch, source = self._made[name]
        if not source:
            return torch.zeros(self._sizes.width)

        value = self._weights[source]
        ratio = patch // self._sizes.patch
        axes = {"p": self._sizes.patch, "q": self._sizes.patch, "c": self._sizes.channels}

        if source == "patch_embedding.weight":
            parts = rearrange(value, "d (o p q c) -> d o p q c", **axes)
            wide = repeat(parts, "d o p q c -> d (o p r q s c)", r=ratio, s=ratio)
            return wide / ratio**2

        if source.startswith("final.linear."):
            parts = rearrange(value, "(o p q c) ... -> o p q c ...", **axes)
            return repeat(parts, "o p q c ... -> (o p r q s c) ...", r=ratio, s=ratio)

        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
