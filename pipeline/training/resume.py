"""Starting a run again: what may have changed since its checkpoint, and what its folder says about it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from model.common.errors import UserError
from model.common.files import naming_full_disk, write_atomic
from pipeline.runtime.finished import FINISHED
from pipeline.stage.config import StageConfig, dump_stage

FIXED = ("objective.", "model.", "fusion.", "elastic.", "users.", "lora.")
"""Settings that define what the network computes and learns."""
FREE = (
    *("model.preset", "model.checkpoint_every", "model.compile", "fusion.expect", "fusion.encode"),
    *("users.drop", "users.dispersion", "users.table_lr"),
)
"""Settings among them that change only how it is computed, or that are checked elsewhere."""


def changed_settings(checkpoint: Path, record: Mapping[str, Any], stage: StageConfig) -> str:
    """Describe the settings that differ from those of a checkpoint: `optim.lr=0.1 (was 0.2), ...`.

    Args:
        checkpoint: its folder, for the message.
        record: settings of the stage in the checkpoint.
        stage: the stage that goes on from there.

    Raises:
        UserError: if a setting differs that defines what the network computes and learns.
    """
    changes = dict(_compare(stage, record))
    refused = [text for key, text in changes.items() if key.startswith(FIXED) and key not in FREE]
    if refused:
        raise UserError(
            f"cannot go on from {checkpoint} with {', '.join(refused)}, since a run learns one thing: "
            f"set it back, or start another run from these weights (name=... start_from={stage.run})"
        )
    return ", ".join(changes.values())


def refuse_fresh_weights(run: Path) -> None:
    """Check that a run without a good checkpoint has not been trained before.

    Raises:
        UserError: if it has checkpoints, all damaged, or was finished.
    """
    checkpoints = run / "checkpoints"
    if list(checkpoints.glob("step_*")) or (run / FINISHED).exists():
        raise UserError(
            f"{checkpoints} has no whole checkpoint, and the run was trained before: put one back, or "
            f"remove {run} to train from the beginning"
        )


def record_stage(stage: StageConfig) -> None:
    """Write into the run's folder what is trained, and that it is not finished.

    Raises:
        UserError: if the disk is full.
    """
    with naming_full_disk(stage.run):
        write_atomic(stage.run / "stage.yaml", dump_stage(stage))
    (stage.run / FINISHED).unlink(missing_ok=True)


def _compare(settings: Any, record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the description of each difference."""
    # Through JSON, since tuples come back from a checkpoint as lists.
    now = json.loads(json.dumps(asdict(settings)))
    for field in fields(settings):
        key, before = path + field.name, record.get(field.name)
        # Checkpoints of earlier versions lack newer settings, and recorded the sizes of a preset as null.
        if field.name not in record or (before is None and key.startswith("model.")):
            continue
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _compare(value, record[field.name], f"{key}.")
        elif now[field.name] != before:
            yield key, f"{key}={_show(now[field.name])} (was {_show(before)})"


def _show(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), 60, placeholder=" ...")
