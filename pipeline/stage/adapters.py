"""Checks of the settings of adapters against those of the stage."""

from model.adapters.config import LoRAConfig, UsersConfig
from model.common.errors import UserError


def check_adapters(freeze: str, start_from: str, users: UsersConfig, lora: LoRAConfig, elastic: bool) -> None:
    """Check that a frozen network has adapters to train, and adapters a frozen network.

    Raises:
        UserError: if they do not fit together.
    """
    asked = [name for name, used in (("users.count", users.count), ("lora.rank", lora.rank)) if used]
    if asked and freeze != "base":
        raise UserError(f"{asked[0]} needs freeze=base: set it, with start_from=... a trained run")
    if freeze == "base" and not asked:
        raise UserError("freeze=base leaves nothing to train: set users.count or lora.rank, or freeze=none")
    if asked and elastic:
        raise UserError(
            f"{asked[0]} needs a network of one depth and patch: export a part of the elastic one, and start "
            "from that"
        )
    if freeze == "base" and not start_from:
        raise UserError("freeze=base needs start_from: name the trained run whose weights are kept")


def check_users(users: UsersConfig, highest: int, snapshot: str) -> None:
    """Check the size of the table of users against the data.

    Args:
        users: settings of the table.
        highest: highest number of a user in the snapshot; -1 = there are none.
        snapshot: its id.

    Raises:
        UserError: if the snapshot has no users, or more than the table has rows.
    """
    if highest < 0:
        raise UserError(
            f"snapshot {snapshot} has no users: run `python -m data_prep users` and take a new snapshot, or "
            "set users.count=0"
        )
    if highest >= users.count:
        raise UserError(
            f"users.count={users.count} is too small: snapshot {snapshot} has users up to number {highest}: "
            f"set at least {highest + 1}"
        )
