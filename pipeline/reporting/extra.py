"""The part of a run's report that another command adds: `report_extra.json`."""

from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from model.common.files import write_atomic
from model.common.records import STRICT, read_record, seal
from pipeline.training.validation import FIXED_TIMESTEPS

EXTRA = "report_extra.json"

Losses = Annotated[list[float], Field(min_length=len(FIXED_TIMESTEPS), max_length=len(FIXED_TIMESTEPS))]


class Learned(TypedDict):
    """Losses at fixed timesteps of the untrained network, and of the trained one with shuffled and with right
    captions."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    timesteps: Losses
    untrained: Losses
    shuffled: Losses
    right: Losses
    untrained_mean: float
    shuffled_mean: float
    right_mean: float
    note: str


class Tile(TypedDict):
    """A key number."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    label: str
    value: str


class Phase(TypedDict):
    """A part of the work, with its time."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    name: str
    seconds: float


class ShownImage(TypedDict):
    """A generated image."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    caption: str
    drawn: str
    """Path relative to the run, as the next."""
    real: NotRequired[str]
    marks: NotRequired[list[str]]
    """Judgments of its claims."""


class Extra(TypedDict, total=False):
    """`report_extra.json`."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    tiles: list[Tile]
    pictures: list[ShownImage]
    pictures_note: str
    learned: Learned
    phases: list[Phase]
    licences: str


def read_extra(run: Path) -> Extra:
    """Return what was added to a run's report.

    Raises:
        UserError: if the record is damaged.
    """
    try:
        return read_record(run / EXTRA, Extra, "remove it")
    except FileNotFoundError:
        return {}


def write_extra(run: Path, extra: Extra) -> None:
    """Add to a run's report, in the place of what was added before."""
    write_atomic(run / EXTRA, seal(dict(extra)))
