"""A record of the settings that a folder was made with, so that results of other settings are never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.common.errors import UserError
from model.common.files import write_atomic
from model.common.records import canonical_json, read_record, seal


def record_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder to `path`, or check them against those written there before.

    Raises:
        UserError: if the folder was made with other settings.
    """
    try:
        recorded = read_record(path, dict[str, Any], "use another folder, or remove it")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, seal(dict(settings)))
        return

    # through JSON, since tuples come back from the file as lists
    wanted = json.loads(canonical_json(settings))
    differing = sorted(key for key in {*recorded, *wanted} if recorded.get(key) != wanted.get(key))
    if differing:
        raise UserError(
            f"{path.parent} was made with other settings ({', '.join(differing)} differ): "
            "use another folder, or remove it"
        )
