"""Settings of the adapters, which a stage's YAML fills in."""

from dataclasses import dataclass, field

from model.common.settings import bounded

MAX_USERS = 10_000_000


@dataclass
class UsersConfig:
    """A learned embedding per user, and the adapter that reads it (after Premier, arXiv 2603.20725).

    Needs `freeze: base`, `start_from`, and a dataset with users.
    """

    count: int = bounded(0, 0, MAX_USERS)
    """Rows of the table of users: at least the users of the data, more to leave room; 0 = no users."""
    tokens: int = bounded(30, 1, 100_000)
    """Tokens of a user's embedding."""
    width: int = bounded(1024, 1, 1_000_000)
    """Channels of a token, and width of the adapter."""
    heads: int = bounded(8, 1, 10_000)
    """Attention heads of the adapter; they divide the width."""
    blocks: int = bounded(3, 1, 1_000)
    """Blocks of the adapter: cross-attention from text tokens to the user's, and a feed-forward layer."""
    rank: int = bounded(256, 1, 1_000_000)
    """Width of the path to the shifts of single blocks."""
    shared: bool = True
    """True if there is one shift of the text tokens for all blocks."""
    distinct: bool = True
    """True if each block has a shift of its own."""
    pooled: bool = True
    """True if the condition is shifted too."""
    dispersion: float = bounded(0.1, 0.0, 1_000.0)
    """Weight of the loss that keeps users apart; 0 = none."""
    drop: float = bounded(0.1, 0.0, 1.0)
    """Share of training samples whose user is left out. Nobody is exactly the frozen network, so such a
    sample costs a pass and has no gradient; with LoRA in the same run it trains that alone."""
    table_lr: float = bounded(10.0, 0.0, 1e6)
    """Learning rate of the table as a multiple of `optim.lr`."""

    @property
    def table_values(self) -> int:
        """Number of values in the table."""
        return self.count * self.tokens * self.width


@dataclass
class LoRAConfig:
    """Low-rank additions to the matrices of the blocks (LoRA, arXiv 2106.09685). Needs `freeze: base`."""

    rank: int = bounded(0, 0, 100_000)
    """Rank of the additions; 0 = none."""
    alpha: float = bounded(16.0, 0.0, 1e6)
    """Scale: the addition is multiplied by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["query_key_value", "query", "key_value", "out", "up", "down"]
    )
    """Last names of the linear layers of the blocks that get one: here, attention and feed-forward layers."""
