"""The position in the training data at which a restarted run continues."""

from dataclasses import asdict, dataclass, field
from typing import Any

from model.common.errors import UserError


@dataclass
class Position:
    """The next global batch, and all that decides which one that is."""

    snapshot: str
    """Id of the snapshot; of a mixture, of all its snapshots, with their weights."""
    seed: int
    epoch: int
    batch: int
    global_batch: int
    order: dict[str, int] = field(default_factory=dict)
    """Everything else that decides the order: planner version, canonical nodes, window, held-out parts."""

    def to_dict(self) -> dict[str, Any]:
        """Return a record for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Position":
        """Read a record that `to_dict` returned.

        Raises:
            UserError: if the record is of something else.
        """
        try:
            return cls(**record)
        except TypeError as error:
            what = f"a record of {', '.join(map(str, record))}" if isinstance(record, dict) else repr(record)
            raise UserError(f"not a position in a snapshot: {what[:200]}") from error

    def check(self, now: "Position") -> None:
        """Refuse to continue inside an epoch whose order has changed; between epochs everything may change.

        Args:
            now: the same batch of the same epoch under the present settings and data.

        Raises:
            UserError: if the order has changed.
        """
        # Nothing of the epoch was read yet, so no sample can be repeated or left out.
        if self.batch == 0:
            return
        # `order` is flattened, so that the message names its settings as it names the other fields.
        old, new = ({**record.pop("order"), **record} for record in (self.to_dict(), now.to_dict()))
        # A setting that only one side knows counts as changed: another version planned that order.
        keys = dict.fromkeys([*new, *old])
        changed = [
            f"{key} was {old.get(key)} and is {new.get(key)}" for key in keys if old.get(key) != new.get(key)
        ]
        if changed:
            raise UserError(
                f"cannot go on at batch {self.batch} of epoch {self.epoch}: {', '.join(changed)}, which "
                "gives this epoch another order, so that samples would be repeated and others left out: "
                "set it back, or start a new stage from the weights (start_from)"
            )
