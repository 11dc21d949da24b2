"""A learned embedding per user, and the adapter through which a frozen network reads it.

After Premier (arXiv 2603.20725), written from the paper's formulas. Text tokens attend to the tokens of the
user; the result shifts the text tokens that cross-attention reads, once for all blocks and once for each, and
the condition. The last layers start at zero: at first every user has the images of the frozen network.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter import ADAPTERS, Adapter, Shifts
from model.adapters.config import UsersConfig
from model.common.errors import UserError
from model.condition import Condition
from model.config import DiTConfig
from model.functional import product_dtype
from model.layers import CrossAttention, Linear, RMSNorm, ZeroLinear

START = 0.1
"""Rows of the table start uniform in [-START, START]."""
QUERY_STD = 0.5
"""Standard deviation of the values that the empty query starts with."""


class UserTable(nn.Module):
    """One row per user: the tokens of the user's embedding."""

    def __init__(self, count: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(count, tokens * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the starting values."""
        nn.init.uniform_(self.weight, -START, START)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the tokens [n, L, W] of the users `ids` int64 [n]; of -1, those of user 0."""
        # The adapter puts zeros in place of what follows from no user.
        return F.embedding(ids.clamp(min=0), self.weight).unflatten(-1, (self.tokens, -1))


class _Query(Linear):
    """From text tokens to queries; its bias is the query of the empty text token."""

    def reset_parameters(self) -> None:
        """Set the starting values."""
        super().reset_parameters()
        # Not zero as other biases: there the gradient of an RMS norm is 1 / sqrt(eps) = 1,000 times as large,
        # and the empty query passes two of them.
        nn.init.normal_(self.bias, std=QUERY_STD)


class _Block(nn.Module):
    """Cross-attention from queries to the tokens of a user, and a feed-forward layer with squared ReLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.user_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.attention = CrossAttention(width, heads)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor, user: Tensor) -> Tensor:
        """Map queries x [B, S, R], each by itself, given the user's tokens [B, L, R]."""
        x = x + self.attention(self.query_norm(x), self.user_norm(user))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


@ADAPTERS.register("users")
class UserAdapter(Adapter):
    """The table of users, and the shifts that follow from a user's row and the text."""

    def __init__(self, sizes: DiTConfig, config: UsersConfig) -> None:
        """Build the adapter.

        Args:
            sizes: of the frozen network.
            config: of the adapter.

        Raises:
            UserError: if the heads do not divide the width, or nothing is to be shifted.
        """
        super().__init__()
        if config.width % config.heads:
            raise UserError(
                f"users.width={config.width} is not a multiple of users.heads={config.heads}: change one"
            )
        if not (config.shared or config.distinct or config.pooled):
            raise UserError("users: shared, distinct and pooled are all false: set one of them")

        self.config = config
        width = config.width
        self.table = UserTable(config.count, config.tokens, width)
        self.query = _Query(sizes.width, width)
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.blocks))
        self.norm = RMSNorm(width)

        self.shared = ZeroLinear(width, sizes.width) if config.shared else None
        self.pooled = ZeroLinear(width, sizes.width) if config.pooled else None
        self.narrow, self.distinct = None, nn.ModuleList()
        if config.distinct:
            # A layer of the full width for each block would have as many parameters as the network itself.
            self.narrow = Linear(width, config.rank)
            self.distinct.extend(ZeroLinear(config.rank, sizes.width) for _ in range(sizes.depth))

    def shifts(self, text: Tensor, condition: Condition) -> Shifts | None:
        """Return the shifts of the batch's users; those of no user (-1) are exactly zero."""
        users = condition.users
        if users is None:
            return None

        tokens = self.table(users.ids) if users.tokens is None else users.tokens.to(text.dtype)
        # The first query is an empty text token: its answer depends on the user alone.
        shifts = self._shifts(F.pad(text, (0, 0, 1, 0)), tokens, users.ids >= 0)

        if users.probes is not None:
            empty = text.new_zeros(len(users.probes), 1, text.shape[-1])
            probed = self._shifts(empty, self.table(users.probes), users.probes >= 0)
            parts = chain([probed.condition, probed.text], probed.text_of_blocks)
            # The first token of an empty text has been cut off: see `_shifts`.
            users.answers = torch.cat([part.flatten(1) for part in parts if part is not None], dim=1)

        return shifts

    def _shifts(self, queries: Tensor, user: Tensor, has_user: Tensor) -> Shifts:
        """Return the shifts.

        Args:
            queries: [B, 1 + S, D], first the empty token; or [B, 1, D], it alone, which is then also the
                text.
            user: tokens of each user [B, L, R].
            has_user: bool [B].
        """
        x = self.query(queries)
        for block in self.blocks:
            x = block(x, user)

        # Zeros by selection and not by a product, which would keep what is not finite.
        x = torch.where(has_user[:, None, None], self.norm(x), 0.0)  # [B, 1 + S, R]
        inner = x[:, 1:] if x.shape[1] > 1 else x

        def masked(layer: nn.Module, values: Tensor) -> Tensor:
            # The layers have biases, which are no part of a user that there is not.
            shift = layer(values)
            return torch.where(has_user.view(-1, *[1] * (shift.dim() - 1)), shift, 0.0)

        low = None if self.narrow is None else self.narrow(inner)

        return Shifts(
            condition=None if self.pooled is None else masked(self.pooled, x[:, 0]),
            text=None if self.shared is None else masked(self.shared, inner),
            text_of_blocks=[] if low is None else [masked(layer, low) for layer in self.distinct],
        )


def mixed_tokens(table: Tensor, coefficients: Tensor, tokens: int) -> Tensor:
    """Return the tokens fp32 [n, L, R] of mixtures of users.

    Args:
        table: rows of the table [count, L R].
        coefficients: [n, count]; one-hot = the row itself.
        tokens: L.
    """
    kind = product_dtype(table)
    return (coefficients.to(kind) @ table.to(kind)).unflatten(-1, (tokens, -1))
