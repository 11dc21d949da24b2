"""An elastic LI-DiT: the network of `model/dit.py`, of which parts compute too.

Depth: a part runs some of the blocks. Patches: another size of patches has its own first and last layers
around the same blocks, and a vector that is added to the time embedding, so that the blocks know the size.
The full network is a plain one: same names of parameters, same starting weights, same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.common.errors import UserError
from model.config import DiTConfig, FusionConfig
from model.dit import LIDiT, Route
from model.elastic.config import ElasticConfig, kept_blocks
from model.layers import Linear, ZeroLinear
from model.sub_network import Part, SubNetwork
from model.video_position import make_position

PARTS = "elastic"
"""Module with the layers of further sizes of patches."""


class TimeShift(nn.Module):
    """A vector that is added to the time embedding; it starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the starting values."""
        nn.init.zeros_(self.vector)

    def forward(self) -> Tensor:
        """Return the vector [D]."""
        # A copy, because ZeRO-3 takes the parameter away when this layer is done.
        return self.vector.clone()


class PatchLayers(nn.Module):
    """First and last layers of a size of patches."""

    def __init__(self, sizes: DiTConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(sizes.patch_values, sizes.width)
        self.position = make_position(sizes)
        self.time_shift = TimeShift(sizes.width)
        self.linear = ZeroLinear(sizes.width, sizes.patch_values)


class ElasticLIDiT(LIDiT):
    """An LI-DiT of which parts compute too: `Condition.part` chooses."""

    def __init__(
        self,
        config: DiTConfig,
        fusion: FusionConfig,
        text_widths: Sequence[int],
        elastic: ElasticConfig,
        checkpoint_every: int = 0,
    ) -> None:
        """Build the network with its starting weights.

        Args:
            config: sizes of the full network.
            fusion: switches of the text side.
            text_widths: width of each LLM's hidden states.
            elastic: depths and sizes of patches.
            checkpoint_every: as in `LIDiT`; blocks are counted in the order in which a part runs them.

        Raises:
            UserError: if the settings do not fit together.
        """
        elastic.check(config)

        super().__init__(config, fusion, text_widths, checkpoint_every)
        self.elastic_config, self.text_widths = elastic, list(text_widths)
        self.kept = kept_blocks(elastic.depths or [config.depth])
        """Depth -> numbers of its blocks."""
        # After all others, which therefore start as those of a plain network.
        self.elastic = nn.ModuleDict()
        for patch in elastic.patches[1:]:
            self.elastic[str(patch)] = PatchLayers(config.with_patch(patch))

    def route(self, part: Part | None) -> Route:
        """Return the layers of a part's forward pass; of None, those of the full network.

        Raises:
            UserError: if the network has no such part.
        """
        if part is None:
            return super().route(None)

        if not isinstance(part, SubNetwork) or part not in self.elastic_config.parts(self.sizes):
            known = ", ".join(map(str, self.elastic_config.parts(self.sizes)))
            raise UserError(f"{part}: the network has no such part: choose one of {known}")

        blocks = [self.blocks[number] for number in self.kept[part.depth]]
        if part.patch == self.sizes.patch:
            return Route(self.sizes, self.patch_embedding, self.position, blocks, self.final.linear)

        own = self.elastic[str(part.patch)]
        assert isinstance(own, PatchLayers)
        sizes = self.sizes.with_patch(part.patch)

        return Route(sizes, own.patch_embedding, own.position, blocks, own.linear, own.time_shift)
