"""Tracks of the speedrun: what is fixed for all who run, and what they may change."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from model.common.errors import UserError
from pipeline.stage.config import StageConfig, load_stage

TARGET = 0.9
"""Share of the segments of held-out prompts that has to be right."""
PROMPTS = 512
MIN_SEEDS = 3

FIXED = (
    "data.store",
    "data.dataset",
    "data.datasets",
    "data.snapshot",
    "data.latents",
    "data.validation_parts",
    "start_from",
    "sample.scenes",
    "sample.scenes_scale",
    "sample.scenes_plain",
    "sample.scenes_objects",
    "sample.height",
    "sample.width",
)
"""Settings that all runs of a track share: the data and the judge. Everything else is free, the sampler and
its guidance too, since only the seconds of training steps count."""


@dataclass(frozen=True)
class Track:
    """A track of the speedrun."""

    stage: str
    """Shipped stage that runs start from."""
    dataset: str
    """Shipped dataset, below `data_prep/datasets/`."""
    hardware: str


TRACKS = {
    "cpu": Track("speedrun", "speedrun.yaml", "2 cores"),
    "gpu": Track("speedrun_gpu", "speedrun_gpu.yaml", "one H100-class GPU, 128 x 128 pixels"),
}


def find_track(name: str) -> Track:
    """Return the track of a name.

    Raises:
        UserError: if there is none.
    """
    if name not in TRACKS:
        raise UserError(f"track {name!r}: the tracks are {', '.join(TRACKS)}")
    return TRACKS[name]


def load_entry(track: Track, settings: Sequence[str]) -> StageConfig:
    """Return the stage of a run with the settings that it changes.

    Raises:
        UserError: if one of them is fixed, or no setting of a stage.
    """
    shipped, entry = load_stage(track.stage), load_stage(track.stage, settings)
    for key in FIXED:
        if _value(shipped, key) != _value(entry, key):
            raise UserError(f"{key} is the same for all runs of a track: leave it out")
    return entry


def changed_settings(track: Track, settings: Sequence[str]) -> list[str]:
    """Return the names of the settings that differ from the track's stage, whatever the text says.

    Raises:
        UserError: as `load_entry`.
    """
    shipped, entry = load_stage(track.stage), load_entry(track, settings)
    return [key for key in _keys(shipped) if _value(shipped, key) != _value(entry, key)]


def _keys(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of a dataclass."""
    keys: list[str] = []
    for field in fields(config):
        inner = getattr(config, field.name)
        keys += _keys(inner, f"{prefix}{field.name}.") if is_dataclass(inner) else [prefix + field.name]
    return keys


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
