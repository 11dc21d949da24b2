"""Where training data continues after a restart."""

from dataclasses import asdict, dataclass, field
from typing import Any

from model.common.errors import UserError


@dataclass
class Position:
    """The next global batch, and all that decides which one that is."""

    snapshot: str
    """Id of the snapshot; in a mixture, of all of them, with their weights."""
    seed: int
    epoch: int
    batch: int
    global_batch: int
    order: dict[str, int] = field(default_factory=dict)
    """What else decides the order: version of the planner, canonical nodes, window, held-out parts."""

    def to_dict(self) -> dict[str, Any]:
        """As a record for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Position":
        """Read back what `to_dict` gave.

        Raises:
            UserError: it was something else that gave the record.
        """
        try:
            return cls(**record)
        except TypeError as error:
            raise UserError(f"not a position in a snapshot: a record of {', '.join(record)}") from error

    def check(self, now: "Position") -> None:
        """Refuse to go on inside an epoch whose order is another now; between epochs everything may change.

        Args:
            now: what the same batch of the same epoch would be with the present settings and data.

        Raises:
            UserError: the order is another.
        """
        if self.batch == 0:
            return
        old, new = ({**record.pop("order"), **record} for record in (self.to_dict(), now.to_dict()))
        keys = dict.fromkeys([*new, *old])
        if changed := [f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys if old.get(key) != new.get(key)]:
            raise UserError(
                f"cannot go on at batch {self.batch} of epoch {self.epoch}: {', '.join(changed)}, which gives "
                "this epoch another order, so that samples would be repeated and others left out: set it back, or start a "
                "new stage from the weights (start_from)"
            )
